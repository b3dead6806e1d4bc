package snapbroker

import "time"

// An Option of Dial.
type Option func(*options) error

type options struct {
	endpoint        string
	eventsEndpoint  string
	namespace       string
	snapshotter     string
	clientKey       string
	serverKey       string
	timeout         time.Duration
	connectTimeout  time.Duration
	patience        time.Duration
	callsPerRequest int
}

// WithEndpoint names the broker's router: a path, ipc://... or tcp://... . Else SNAPBROKER_ENDPOINT, else the machine's
// own socket.
func WithEndpoint(endpoint string) Option {
	return func(o *options) error { o.endpoint = endpoint; return nil }
}

// WithEventsEndpoint names the broker's publisher. Else SNAPBROKER_EVENTS_ENDPOINT, else events.sock beside an ipc
// router's socket, else what the broker's status says.
func WithEventsEndpoint(endpoint string) Option {
	return func(o *options) error { o.eventsEndpoint = endpoint; return nil }
}

// WithNamespace says whose snapshots are meant. Else SNAPBROKER_NAMESPACE, else "default".
func WithNamespace(namespace string) Option {
	return func(o *options) error { o.namespace = namespace; return nil }
}

// WithSnapshotter says which snapshotter is meant. Else SNAPBROKER_SNAPSHOTTER, else the broker's only one.
func WithSnapshotter(name string) Option {
	return func(o *options) error { o.snapshotter = name; return nil }
}

// WithTimeout says how long a call may take whose context has no deadline: 60 seconds where nothing is said.
func WithTimeout(timeout time.Duration) Option {
	return func(o *options) error { o.timeout = timeout; return positive("timeout", timeout) }
}

// WithConnectTimeout says how long a call waits for a broker that is not there: 3 seconds where nothing is said.
func WithConnectTimeout(timeout time.Duration) Option {
	return func(o *options) error { o.connectTimeout = timeout; return positive("connect timeout", timeout) }
}

// WithPatience says for how long a request is repeated that lost its connection, or found the snapshotter unavailable:
// 10 seconds where nothing is said, and never beyond the call's own deadline. With 0 nothing is repeated.
func WithPatience(patience time.Duration) Option {
	return func(o *options) error { o.patience = patience; return nil }
}

// WithClientKey names the file with this client's CURVE key, for tcp endpoints (3/SNBA). Else SNAPBROKER_CLIENT_KEY, else
// there is no CURVE.
func WithClientKey(path string) Option {
	return func(o *options) error { o.clientKey = path; return nil }
}

// WithServerKey gives the broker's public CURVE key, or the path of a file with it. Else SNAPBROKER_SERVER_KEY, else
// the server_key in the client's key file.
func WithServerKey(keyOrPath string) Option {
	return func(o *options) error { o.serverKey = keyOrPath; return nil }
}

// WithCallsPerRequest says how many calls of concurrent goroutines travel in one request at most: 256 where nothing is
// said, and fewer of those that read.
func WithCallsPerRequest(calls int) Option {
	return func(o *options) error {
		if calls < 1 || calls > CallsMax {
			return invalid("calls per request must be 1 to %d, not %d", CallsMax, calls)
		}
		o.callsPerRequest = calls
		return nil
	}
}

func positive(what string, duration time.Duration) error {
	if duration <= 0 {
		return invalid("%s must be longer than nothing, not %v", what, duration)
	}
	return nil
}

// Options of calls. Each satisfies the interfaces of those calls that take it.
type (
	// A PrepareOption is WithLabels or WithProgress.
	PrepareOption interface{ applyPrepare(*callOptions) }
	// A ViewOption is WithLabels.
	ViewOption interface{ applyView(*callOptions) }
	// A CommitOption is WithLabels, WithParent, WithSync, WithFence or WithProgress.
	CommitOption interface{ applyCommit(*callOptions) }
	// A RemoveOption is WithFence.
	RemoveOption interface{ applyRemove(*callOptions) }
	// A MountsOption is WithFence.
	MountsOption interface{ applyMounts(*callOptions) }
	// A UsageOption is WithProgress.
	UsageOption interface{ applyUsage(*callOptions) }
	// A CleanupOption is WithProgress.
	CleanupOption interface{ applyCleanup(*callOptions) }
	// A WalkOption is WithPage.
	WalkOption interface{ applyWalk(*callOptions) }
	// An AuditOption is WithPage or WithProgress.
	AuditOption interface{ applyAudit(*callOptions) }
	// A RepairOption is WithExecute, WithPage or WithProgress.
	RepairOption interface{ applyRepair(*callOptions) }
)

type callOptions struct {
	labels  Labels
	parent  string
	sync    bool
	fence   int64
	page    int64
	execute bool
	report  func(Progress)
}

type (
	labelsOption   Labels
	parentOption   string
	syncOption     bool
	executeOption  bool
	fenceOption    int64
	pageOption     int64
	progressOption func(Progress)
)

// WithLabels gives the snapshot labels. Those of a committed snapshot are exactly these: it inherits none.
func WithLabels(labels Labels) interface {
	PrepareOption
	ViewOption
	CommitOption
} {
	return labelsOption(labels)
}

// WithParent says the parent of a snapshot that was prepared without one, on snapshotters with the capability "rebase".
func WithParent(name string) CommitOption { return parentOption(name) }

// WithSync has the files on disk before the name exists.
func WithSync() CommitOption { return syncOption(true) }

// WithFence has the call refused with ErrFailedPrecondition unless key stands for the snapshot whose prepare or view
// answered this fence.
func WithFence(fence int64) interface {
	CommitOption
	RemoveOption
	MountsOption
} {
	return fenceOption(fence)
}

// WithPage says how many infos or findings a page has at most, 1 to 10,000: 1000 where nothing is said.
func WithPage(most int) interface {
	WalkOption
	AuditOption
	RepairOption
} {
	return pageOption(most)
}

// WithExecute has the repair change what it can mend.
func WithExecute() RepairOption { return executeOption(true) }

// WithProgress has report called now and then, by the calling goroutine, while a long call is at work.
func WithProgress(report func(Progress)) interface {
	PrepareOption
	CommitOption
	UsageOption
	CleanupOption
	AuditOption
	RepairOption
} {
	return progressOption(report)
}

func (l labelsOption) applyPrepare(o *callOptions)   { o.labels = Labels(l) }
func (l labelsOption) applyView(o *callOptions)      { o.labels = Labels(l) }
func (l labelsOption) applyCommit(o *callOptions)    { o.labels = Labels(l) }
func (p parentOption) applyCommit(o *callOptions)    { o.parent = string(p) }
func (s syncOption) applyCommit(o *callOptions)      { o.sync = bool(s) }
func (f fenceOption) applyCommit(o *callOptions)     { o.fence = int64(f) }
func (f fenceOption) applyRemove(o *callOptions)     { o.fence = int64(f) }
func (f fenceOption) applyMounts(o *callOptions)     { o.fence = int64(f) }
func (p pageOption) applyWalk(o *callOptions)        { o.page = int64(p) }
func (p pageOption) applyAudit(o *callOptions)       { o.page = int64(p) }
func (p pageOption) applyRepair(o *callOptions)      { o.page = int64(p) }
func (e executeOption) applyRepair(o *callOptions)   { o.execute = bool(e) }
func (p progressOption) applyAudit(o *callOptions)   { o.report = p }
func (p progressOption) applyRepair(o *callOptions)  { o.report = p }
func (p progressOption) applyPrepare(o *callOptions) { o.report = p }
func (p progressOption) applyCommit(o *callOptions)  { o.report = p }
func (p progressOption) applyUsage(o *callOptions)   { o.report = p }
func (p progressOption) applyCleanup(o *callOptions) { o.report = p }

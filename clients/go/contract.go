package snapbroker

import (
	"regexp"
	"strings"
	"time"
	"unicode/utf8"
)

// Limits of the contract (1/SNBR section 9).
const (
	NameBytesMax      = 4096      // longest key or name, in bytes of UTF-8
	LabelBytesMax     = 4096      // longest label, key and value together
	LabelsMax         = 1024      // most labels of a snapshot
	NamespaceBytesMax = 76        // longest namespace
	CallsMax          = 1024      // most calls of a request, so of a batch
	PageMax           = 10_000    // most infos or events in a page
	FiltersMax        = 64        // most filters of a walk, most topics of a subscriber
	BodyBytesMax      = 16 << 20  // longest body of a request, and of a part of a reply
	FenceMax          = 1<<63 - 1 // highest fencing number: that of a sequence
	targetBytesMax    = 64
)

// Labels of a snapshot. One with an empty value is legal and not stored.
type Labels map[string]string

// Kind is what a snapshot is.
type Kind string

// The kinds.
const (
	View      Kind = "view"      // read under its key
	Active    Kind = "active"    // written to under its key
	Committed Kind = "committed" // never changes again, and may be a parent
)

// Info is what is known of a snapshot without looking at its files.
type Info struct {
	Name    string `json:"name"` // the key of an active snapshot or view, the name of a committed one
	Kind    Kind   `json:"kind"`
	Parent  string `json:"parent"`  // "" for none
	Labels  Labels `json:"labels"`  // nil for none
	Created int64  `json:"created"` // nanoseconds since 1970-01-01T00:00:00Z
	Updated int64  `json:"updated"` // nanoseconds since 1970-01-01T00:00:00Z
}

// CreatedAt is Created as a time.
func (i Info) CreatedAt() time.Time { return time.Unix(0, i.Created) }

// UpdatedAt is Updated as a time.
func (i Info) UpdatedAt() time.Time { return time.Unix(0, i.Updated) }

// Mount is one mount to make, in the words of mount(8).
type Mount struct {
	Type    string
	Source  string
	Options []string
	Target  string // relative to the mount point; "" for the mount point itself
}

// Mounts of an active snapshot or view, to make in their order.
type Mounts struct {
	Mounts []Mount
	// Fence is the snapshot's fencing number: that of a later snapshot under the same key is higher. Commit, Remove and
	// Mounts that carry it (see Fence) are refused with ErrFailedPrecondition once the key stands for another snapshot.
	Fence int64
}

// Usage is what a snapshot takes beyond its parents.
type Usage struct {
	Inodes int64 `json:"inodes"`
	Size   int64 `json:"size"` // bytes of allocated blocks
}

// Progress tells how far a long call is; what is to do is not known beforehand.
type Progress struct {
	Entries int64
	Bytes   int64
}

// Event is one change of a snapshotter (2/SNBE section 5).
type Event struct {
	Sequence    int64 // 1 for the snapshotter's first event, then one more each
	Previous    int64 // the sequence of the event before it on the same topic; 0 for the first
	Time        int64 // nanoseconds since 1970-01-01T00:00:00Z; for people, order is the sequence's
	Snapshotter string
	Namespace   string
	Verb        string // prepare, view, commit, update, remove or cleanup
	Key         string // the key or name; for commit the key that was consumed
	Info        *Info  // the snapshot as it is after the change; nil for remove and cleanup
}

// Topic is the topic that the event is published on.
func (e *Event) Topic() string { return Topic(e.Snapshotter, e.Namespace, e.Verb) }

// isOn says whether topic is the event's, without making one.
func (e *Event) isOn(topic []byte) bool {
	for _, part := range [...]string{e.Snapshotter, "/", e.Namespace, "/snapshot/", e.Verb} {
		if len(topic) < len(part) || string(topic[:len(part)]) != part {
			return false
		}
		topic = topic[len(part):]
	}
	return len(topic) == 0
}

// Topic is <snapshotter>/<namespace>/snapshot/<verb>, or the beginning of it where verb is "".
func Topic(snapshotter, namespace, verb string) string {
	return snapshotter + "/" + namespace + "/snapshot/" + verb
}

func heartbeatTopic(snapshotter string) string { return snapshotter + "//heartbeat" }

// SnapshotterStatus is how one snapshotter is.
type SnapshotterStatus struct {
	Name          string
	Backend       string
	State         string // starting, ready, unavailable or stopped
	PID           int64
	Restarts      int64
	ResidentBytes int64
	CPUSeconds    float64
	OpenFiles     int64
	Sequence      int64 // of the newest event
	Snapshots     int64
	Capabilities  []string
	Root          string
	Queues        map[string]map[string]int64
	Backlog       map[string]int64 // entries and bytes of removed snapshots that are still to be deleted
}

// Status is how the broker is, and each of its snapshotters.
type Status struct {
	Version        string
	PID            int64
	UptimeSeconds  float64
	ResidentBytes  int64
	Endpoint       string
	EventsEndpoint string
	Queues         map[string]map[string]int64
	Snapshotters   []SnapshotterStatus
}

// WalkPage is one page of a walk.
type WalkPage struct {
	Infos []Info
	// Sequence is that of the newest event contained in the page. Events above the FIRST page's bring all pages of the
	// walk up to date (2/SNBE section 6).
	Sequence int64
	next     string
}

// A Finding is something that is not as it must be, or that somebody should know of (1/SNBR section 5.15). What it is
// about is in those of Namespace, Key, ID, Path and Sequence that are known.
type Finding struct {
	Kind      string // one of those that the specification lists, or one that it does not know yet
	Severity  string // note, warning or error
	Message   string
	Advice    string
	Namespace string
	Key       string
	ID        int64
	Path      string
	Sequence  int64
	Time      int64 // since when, in nanoseconds since 1970-01-01T00:00:00Z; 0: unknown
	Inodes    int64 // what it takes, as Size
	Size      int64 // bytes
	Repair    string
	Mended    bool   // by the repair that tells it
	Failure   string // why it could not be mended
}

// AuditPage is one page of an audit or a repair, with its findings in the order in which they were made.
type AuditPage struct {
	Findings []Finding
	Looked   int64 // how many things were looked at, as far as known
	next     string
}

// MountUse is a mount that uses a snapshot's files.
type MountUse struct {
	Point   string
	Type    string
	PID     int64  // of a process in whose mount namespace it is
	Process string // its name
}

// WhyAnswer is what keeps a snapshot, and the last that the journal says of its name (1/SNBR section 5.16).
type WhyAnswer struct {
	Info          *Info // nil where there is no such snapshot
	ID            int64
	Fence         int64
	Broken        bool     // its files are missing
	Children      []string // the first of those that lie on it
	ChildrenCount int64    // all of them
	Holds         []string // calls under way that need it
	Mounts        []MountUse
	References    []string // the containerd.io/snapshot.ref under which it is found
	Events        []Event  // the last on the name, the newest first
	Oldest        int64    // the oldest sequence that the journal keeps
}

type eventsPage struct {
	events []Event
	next   int64
	newest int64
}

type heartbeat struct {
	sequence int64
	previous int64
	time     int64
	topics   map[string]int64 // nil where there were too many
}

var namespaceForm = regexp.MustCompile(`^[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*$`)

func checkNamespace(namespace string) error {
	if namespace == "" {
		return fault(CodeFailedPrecondition, "namespace is required: name one, such as 'default'")
	}
	if len(namespace) > NamespaceBytesMax || namespace == "version" || strings.ContainsRune(namespace, '\n') ||
		!namespaceForm.MatchString(namespace) {
		return invalid("namespace %.80q must be at most %d letters and digits, single '.', '_' or '-' between them, "+
			"and not 'version'", namespace, NamespaceBytesMax)
	}
	return nil
}

// checkText refuses at the caller what would spoil the request that other callers' calls travel in.
func checkText(value, what string) error {
	if !utf8.ValidString(value) {
		return invalid("%s %.80q is not UTF-8", what, value)
	}
	return nil
}

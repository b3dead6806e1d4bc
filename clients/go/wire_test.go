package snapbroker

import (
	"errors"
	"maps"
	"slices"

	"github.com/tinylib/msgp/msgp"
)

// The other halves of the wire, for tests: what a broker reads, and what it writes.

type bodyOfRequest struct {
	calls     []call
	namespace string
	atomic    bool
	timeoutMS int64
	token     []byte
}

func (r *reader) request() bodyOfRequest {
	var request bodyOfRequest
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "calls":
			got |= 1
			left := r.array()
			if r.err == nil && (left == 0 || left > CallsMax) {
				r.fail(errors.New("too few calls or too many"))
			}
			for ; left > 0 && r.err == nil; left-- {
				request.calls = append(request.calls, r.call())
			}
		case "namespace":
			request.namespace = r.text()
		case "atomic":
			request.atomic = r.boolean()
		case "timeout_ms":
			request.timeoutMS = r.integer()
		case "token":
			if request.token = r.bytes(); len(request.token) > 64 {
				r.fail(errors.New("a token over 64 bytes"))
			}
		default:
			r.skip(0)
		}
	}
	r.required(got, 1, "a request")
	return request
}

func (r *reader) bytes() []byte {
	value, rest, err := msgp.ReadBytesBytes(r.rest, nil)
	r.take(rest, err)
	return value
}

func (r *reader) pairs() []label {
	var pairs []label
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		key := r.text()
		pairs = slices.DeleteFunc(pairs, func(other label) bool { return other.key == key })
		pairs = append(pairs, label{key, r.text()})
	}
	return pairs
}

func (r *reader) call() call {
	one := call{}
	fields := map[string]bool{}
	begin := *r
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		if string(r.field()) == "verb" {
			i := slices.Index(verbNames[:], r.text())
			if i < 0 {
				r.fail(errors.New("unknown verb"))
			}
			one.verb = verb(max(i, 0))
			fields["verb"] = true
		} else {
			r.skip(0)
		}
	}
	if r.err != nil {
		return one
	}
	switch one.verb {
	case verbWalk, verbEvents, verbAudit, verbRepair:
		one.page, one.credit = pageDefault, creditDefault
	}
	end := *r
	*r = begin
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		name := string(r.field())
		fields[name] = true
		switch name {
		case "key":
			one.key = r.text()
		case "name":
			one.name = r.text()
		case "parent":
			one.parent = r.text()
		case "labels":
			one.labels = r.pairs()
		case "fieldpaths":
			one.fieldpaths = r.texts()
		case "sync":
			one.sync = r.boolean()
		case "fence":
			one.fence = r.integer()
		case "filters", "topics":
			one.filters = r.texts()
		case "after":
			one.after = r.text()
		case "since":
			one.since = r.integer()
		case "page":
			one.page = r.integer()
		case "credit":
			one.credit = r.integer()
		case "follow":
			one.follow = r.boolean()
		case "execute":
			one.execute = r.boolean()
		case "request":
			one.request = r.bytes()
		case "calls":
			for left := r.array(); left > 0 && r.err == nil; left-- {
				one.calls = append(one.calls, int(r.integer()))
			}
		default:
			r.skip(0)
		}
	}
	if r.err != nil {
		return one
	}
	*r = end
	required := map[verb][]string{
		verbPrepare: {"key"}, verbView: {"key"}, verbCommit: {"name", "key"}, verbRemove: {"key"}, verbMounts: {"key"},
		verbStat: {"key"}, verbUpdate: {"name"}, verbUsage: {"key"}, verbEvents: {"since"}, verbCancel: {"request"},
		verbWhy: {"key"},
	}
	for _, name := range append(required[one.verb], "verb") {
		if !fields[name] {
			r.fail(errors.New("a call lacks " + name))
		}
	}
	return one
}

// writer writes messages. The keys of a map that has no order of its own are written in that of their bytes.
type writer struct {
	message
	stack []message
}

func newWriter() *writer { return &writer{} }

func (w *writer) begin() {
	outer := w.message
	w.stack = append(w.stack, outer)
	if outer.body == nil {
		outer.body = []byte{}
	}
	// A map of more than 15 fields does not occur.
	w.message = begin(outer.body)
}

func (w *writer) end() {
	body := w.message.end()
	w.message = w.stack[len(w.stack)-1]
	w.stack = w.stack[:len(w.stack)-1]
	w.body = body
}

func (w *writer) request(r bodyOfRequest) {
	calls := make([][]byte, 0, len(r.calls))
	for i := range r.calls {
		calls = append(calls, r.calls[i].append(nil))
	}
	w.body = appendRequest(w.body, calls, r.namespace, r.atomic, r.timeoutMS, r.token)
}

func (w *writer) info(info Info) {
	w.begin()
	w.text("name", info.Name)
	w.text("kind", string(info.Kind))
	w.textIf("parent", info.Parent)
	if len(info.Labels) > 0 {
		w.key("labels")
		w.body = msgp.AppendMapHeader(w.body, uint32(len(info.Labels)))
		for _, key := range slices.Sorted(maps.Keys(info.Labels)) {
			w.body = msgp.AppendString(w.body, key)
			w.body = msgp.AppendString(w.body, info.Labels[key])
		}
	}
	w.integerUnless("created", info.Created, 0)
	w.integerUnless("updated", info.Updated, 0)
	w.end()
}

func (w *writer) mounts(m Mounts) {
	w.begin()
	w.key("mounts")
	w.body = msgp.AppendArrayHeader(w.body, uint32(len(m.Mounts)))
	for _, mount := range m.Mounts {
		w.begin()
		w.text("type", mount.Type)
		w.text("source", mount.Source)
		w.textsIf("options", mount.Options)
		w.textIf("target", mount.Target)
		w.end()
	}
	w.integerUnless("fence", m.Fence, 0)
	w.end()
}

func (w *writer) usage(u Usage) {
	w.begin()
	w.integer("inodes", u.Inodes)
	w.integer("size", u.Size)
	w.end()
}

func (w *writer) walkPage(p WalkPage) {
	w.begin()
	if len(p.Infos) > 0 {
		w.key("infos")
		w.body = msgp.AppendArrayHeader(w.body, uint32(len(p.Infos)))
		for _, info := range p.Infos {
			w.info(info)
		}
	}
	w.integerUnless("sequence", p.Sequence, 0)
	w.textIf("next", p.next)
	w.end()
}

func (w *writer) finding(f Finding) {
	w.begin()
	w.text("kind", f.Kind)
	w.text("severity", f.Severity)
	w.text("message", f.Message)
	w.text("advice", f.Advice)
	w.textIf("namespace", f.Namespace)
	w.textIf("key", f.Key)
	w.integerUnless("id", f.ID, 0)
	w.textIf("path", f.Path)
	w.integerUnless("sequence", f.Sequence, 0)
	w.integerUnless("time", f.Time, 0)
	w.integerUnless("inodes", f.Inodes, 0)
	w.integerUnless("size", f.Size, 0)
	w.textIf("repair", f.Repair)
	w.trueIf("mended", f.Mended)
	w.textIf("failure", f.Failure)
	w.end()
}

func (w *writer) auditPage(p AuditPage) {
	w.begin()
	if len(p.Findings) > 0 {
		w.key("findings")
		w.body = msgp.AppendArrayHeader(w.body, uint32(len(p.Findings)))
		for _, finding := range p.Findings {
			w.finding(finding)
		}
	}
	w.textIf("next", p.next)
	w.integerUnless("looked", p.Looked, 0)
	w.end()
}

func (w *writer) why(a WhyAnswer) {
	w.begin()
	if a.Info != nil {
		w.key("info")
		w.info(*a.Info)
	}
	w.integerUnless("id", a.ID, 0)
	w.integerUnless("fence", a.Fence, 0)
	w.trueIf("broken", a.Broken)
	w.textsIf("children", a.Children)
	w.integerUnless("children_count", a.ChildrenCount, 0)
	w.textsIf("holds", a.Holds)
	if len(a.Mounts) > 0 {
		w.key("mounts")
		w.body = msgp.AppendArrayHeader(w.body, uint32(len(a.Mounts)))
		for _, use := range a.Mounts {
			w.begin()
			w.text("point", use.Point)
			w.text("type", use.Type)
			w.integerUnless("pid", use.PID, 0)
			w.textIf("process", use.Process)
			w.end()
		}
	}
	w.textsIf("references", a.References)
	if len(a.Events) > 0 {
		w.key("events")
		w.body = msgp.AppendArrayHeader(w.body, uint32(len(a.Events)))
		for _, event := range a.Events {
			w.event(event)
		}
	}
	w.integerUnless("oldest", a.Oldest, 0)
	w.end()
}

func (w *writer) eventsPage(p eventsPage) {
	w.begin()
	if len(p.events) > 0 {
		w.key("events")
		w.body = msgp.AppendArrayHeader(w.body, uint32(len(p.events)))
		for _, event := range p.events {
			w.event(event)
		}
	}
	w.integerUnless("next", p.next, 0)
	w.integerUnless("newest", p.newest, 0)
	w.end()
}

func (w *writer) event(e Event) {
	w.begin()
	w.integer("sequence", e.Sequence)
	w.integer("previous", e.Previous)
	w.integer("time", e.Time)
	w.text("snapshotter", e.Snapshotter)
	w.text("namespace", e.Namespace)
	w.text("verb", e.Verb)
	w.textIf("key", e.Key)
	if e.Info != nil {
		w.key("info")
		w.info(*e.Info)
	}
	w.end()
}

func (w *writer) heartbeat(h heartbeat) {
	w.begin()
	w.integer("sequence", h.sequence)
	w.integer("previous", h.previous)
	w.integer("time", h.time)
	if h.topics != nil {
		w.integers("topics", h.topics)
	}
	w.end()
}

func (w *writer) integers(name string, values map[string]int64) {
	w.key(name)
	w.body = msgp.AppendMapHeader(w.body, uint32(len(values)))
	for _, key := range slices.Sorted(maps.Keys(values)) {
		w.body = msgp.AppendString(w.body, key)
		w.body = appendInteger(w.body, values[key])
	}
}

func (w *writer) queues(values map[string]map[string]int64) {
	if len(values) > 0 {
		w.key("queues")
		w.body = msgp.AppendMapHeader(w.body, uint32(len(values)))
		for _, key := range slices.Sorted(maps.Keys(values)) {
			fields := w.fields
			w.integers(key, values[key])
			w.fields = fields
		}
	}
}

func (w *writer) status(s Status) {
	w.begin()
	w.text("version", s.Version)
	w.integer("pid", s.PID)
	w.key("uptime_seconds")
	w.body = msgp.AppendFloat64(w.body, s.UptimeSeconds)
	w.integer("resident_bytes", s.ResidentBytes)
	w.text("endpoint", s.Endpoint)
	w.text("events_endpoint", s.EventsEndpoint)
	w.queues(s.Queues)
	if len(s.Snapshotters) > 0 {
		w.key("snapshotters")
		w.body = msgp.AppendArrayHeader(w.body, uint32(len(s.Snapshotters)))
		for _, one := range s.Snapshotters {
			w.snapshotterStatus(one)
		}
	}
	w.end()
}

func (w *writer) snapshotterStatus(s SnapshotterStatus) {
	w.begin()
	w.text("name", s.Name)
	w.text("backend", s.Backend)
	w.text("state", s.State)
	w.integerUnless("pid", s.PID, 0)
	w.integerUnless("restarts", s.Restarts, 0)
	w.integerUnless("resident_bytes", s.ResidentBytes, 0)
	if s.CPUSeconds != 0 {
		w.key("cpu_seconds")
		w.body = msgp.AppendFloat64(w.body, s.CPUSeconds)
	}
	w.integerUnless("open_files", s.OpenFiles, 0)
	w.integerUnless("sequence", s.Sequence, 0)
	w.integerUnless("snapshots", s.Snapshots, 0)
	w.textsIf("capabilities", s.Capabilities)
	w.textIf("root", s.Root)
	w.queues(s.Queues)
	if len(s.Backlog) > 0 {
		w.integers("backlog", s.Backlog)
	}
	w.end()
}

func (w *writer) fault(e *Error) {
	w.begin()
	w.text("code", string(e.Code))
	w.text("message", e.Message)
	if len(e.Details) > 0 {
		w.key("details")
		w.body = msgp.AppendMapHeader(w.body, uint32(len(e.Details)))
		for _, key := range slices.Sorted(maps.Keys(e.Details)) {
			w.body = msgp.AppendString(w.body, key)
			w.value(e.Details[key])
		}
	}
	w.end()
}

func (w *writer) value(value any) {
	switch value := value.(type) {
	case int64:
		w.body = appendInteger(w.body, value)
	case []any:
		w.body = msgp.AppendArrayHeader(w.body, uint32(len(value)))
		for _, entry := range value {
			w.value(entry)
		}
	case map[string]any:
		w.body = msgp.AppendMapHeader(w.body, uint32(len(value)))
		for _, key := range slices.Sorted(maps.Keys(value)) {
			w.body = msgp.AppendString(w.body, key)
			w.value(value[key])
		}
	default:
		w.body, _ = msgp.AppendIntf(w.body, value)
	}
}

func (w *writer) reply(r reply) {
	w.begin()
	if len(r.outcomes) > 0 {
		w.key("outcomes")
		w.body = msgp.AppendArrayHeader(w.body, uint32(len(r.outcomes)))
		for _, one := range r.outcomes {
			w.outcome(one)
		}
	}
	if r.error != nil {
		w.key("error")
		w.fault(r.error)
	}
	w.end()
}

func (w *writer) outcome(o outcome) {
	w.begin()
	w.integer("call", o.call)
	if o.ok != nil {
		w.key("ok")
		w.body = append(w.body, o.ok...)
	}
	if o.error != nil {
		w.key("error")
		w.fault(o.error)
	}
	if o.progress != nil {
		w.key("progress")
		w.begin()
		w.integerUnless("entries", o.progress.Entries, 0)
		w.integerUnless("bytes", o.progress.Bytes, 0)
		w.end()
	}
	w.end()
}

// body is what write writes.
func body[T any](write func(*writer, T), value T) []byte {
	w := newWriter()
	write(w, value)
	return w.body
}

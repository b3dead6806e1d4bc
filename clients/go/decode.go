package snapbroker

import (
	"errors"
	"fmt"
	"math"
	"unicode/utf8"

	"github.com/tinylib/msgp/msgp"
)

// The reading half of the wire. Whatever bytes come in, a message comes out or an error with CodeInternal: the types
// are strict, fields that nobody knows are skipped, and no length makes it reserve memory that the body does not fill.

// nestingMax is the deepest nesting that is read; writers go to 32 levels.
const nestingMax = 64

var (
	errTrailing = errors.New("bytes follow the message")
	errUTF8     = errors.New("a string is not UTF-8")
	errNesting  = fmt.Errorf("nested deeper than %d levels", nestingMax)
)

// reader takes values off the front of a body; the first error stays, and every value after it is zero.
type reader struct {
	rest   []byte
	err    error
	before Event // the one before this, whose texts the next is likely to have
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
	r.rest = nil
}

func (r *reader) take(rest []byte, err error) bool {
	if err != nil {
		r.fail(err)
		return false
	}
	r.rest = rest
	return true
}

func (r *reader) text() string {
	value, rest, err := msgp.ReadStringZC(r.rest)
	if !r.take(rest, err) {
		return ""
	}
	if !utf8.Valid(value) {
		r.fail(errUTF8)
		return ""
	}
	return string(value)
}

// textLike is text that is likely to be the same as one that is there already.
func (r *reader) textLike(known string) string {
	if value, rest, err := msgp.ReadStringZC(r.rest); err == nil && string(value) == known {
		r.rest = rest
		return known
	}
	return r.text()
}

func (r *reader) integer() int64 {
	value, rest, err := msgp.ReadInt64Bytes(r.rest)
	r.take(rest, err)
	return value
}

func (r *reader) float() float64 {
	var value float64
	var rest []byte
	var err error
	switch msgp.NextType(r.rest) {
	case msgp.IntType, msgp.UintType:
		var whole int64
		whole, rest, err = msgp.ReadInt64Bytes(r.rest)
		value = float64(whole)
	case msgp.Float32Type:
		var short float32
		short, rest, err = msgp.ReadFloat32Bytes(r.rest)
		value = float64(short)
	default:
		value, rest, err = msgp.ReadFloat64Bytes(r.rest)
	}
	r.take(rest, err)
	return value
}

// absent takes a nil, which stands for an absent value where one may be absent.
func (r *reader) absent() bool {
	if r.err != nil || !msgp.IsNil(r.rest) {
		return false
	}
	r.rest = r.rest[1:]
	return true
}

// count is the number of entries of an array or map, each of which takes at least size bytes.
func (r *reader) count(n uint32, rest []byte, err error, size int) int {
	if r.take(rest, err) && uint64(n)*uint64(size) > uint64(len(rest)) {
		r.fail(msgp.ErrShortBytes)
	}
	if r.err != nil {
		return 0
	}
	return int(n)
}

func (r *reader) array() int {
	n, rest, err := msgp.ReadArrayHeaderBytes(r.rest)
	return r.count(n, rest, err, 1)
}

func (r *reader) mapping() int {
	n, rest, err := msgp.ReadMapHeaderBytes(r.rest)
	return r.count(n, rest, err, 2)
}

// field is the name of a map's next field, not copied.
func (r *reader) field() []byte {
	value, rest, err := msgp.ReadStringZC(r.rest)
	if !r.take(rest, err) {
		return nil
	}
	if !utf8.Valid(value) {
		r.fail(errUTF8)
		return nil
	}
	return value
}

// raw is the next value's bytes, whatever it is.
func (r *reader) raw() []byte {
	before := r.rest
	r.skip(0)
	if r.err != nil {
		return nil
	}
	return before[:len(before)-len(r.rest)]
}

func (r *reader) skip(depth int) {
	if r.err != nil {
		return
	}
	if depth > nestingMax {
		r.fail(errNesting)
		return
	}
	switch msgp.NextType(r.rest) {
	case msgp.MapType:
		for n := r.mapping(); n > 0 && r.err == nil; n-- {
			r.skip(depth + 1)
			r.skip(depth + 1)
		}
	case msgp.ArrayType:
		for n := r.array(); n > 0 && r.err == nil; n-- {
			r.skip(depth + 1)
		}
	default:
		r.take(msgp.Skip(r.rest))
	}
}

func (r *reader) texts() []string {
	n := r.array()
	if n == 0 {
		return nil
	}
	values := make([]string, 0, n)
	for ; n > 0 && r.err == nil; n-- {
		values = append(values, r.text())
	}
	return values
}

func (r *reader) labels() Labels {
	n := r.mapping()
	if n == 0 {
		return nil
	}
	labels := make(Labels, min(n, LabelsMax))
	for ; n > 0 && r.err == nil; n-- {
		key := r.text()
		labels[key] = r.text()
	}
	return labels
}

func (r *reader) integers() map[string]int64 {
	n := r.mapping()
	values := make(map[string]int64, min(n, 64))
	for ; n > 0 && r.err == nil; n-- {
		key := r.text()
		values[key] = r.integer()
	}
	return values
}

func (r *reader) queues() map[string]map[string]int64 {
	n := r.mapping()
	values := make(map[string]map[string]int64, min(n, 64))
	for ; n > 0 && r.err == nil; n-- {
		key := r.text()
		values[key] = r.integers()
	}
	return values
}

// value is whatever comes, as details hold it.
func (r *reader) value(depth int) any {
	if depth > nestingMax {
		r.fail(errNesting)
	}
	if r.err != nil {
		return nil
	}
	switch msgp.NextType(r.rest) {
	case msgp.MapType:
		return r.details(depth)
	case msgp.ArrayType:
		n := r.array()
		values := make([]any, 0, min(n, 64))
		for ; n > 0 && r.err == nil; n-- {
			values = append(values, r.value(depth+1))
		}
		return values
	case msgp.StrType:
		return r.text()
	case msgp.UintType:
		whole, rest, err := msgp.ReadUint64Bytes(r.rest)
		r.take(rest, err)
		if whole <= math.MaxInt64 {
			return int64(whole)
		}
		return whole
	default:
		value, rest, err := msgp.ReadIntfBytes(r.rest)
		r.take(rest, err)
		return value
	}
}

func (r *reader) details(depth int) map[string]any {
	n := r.mapping()
	values := make(map[string]any, min(n, 64))
	for ; n > 0 && r.err == nil; n-- {
		key := r.text()
		values[key] = r.value(depth + 1)
	}
	return values
}

// required fails unless every bit of want is among those of got.
func (r *reader) required(got, want uint, what string) {
	if r.err == nil && got&want != want {
		r.fail(errors.New(what + " lacks a required field"))
	}
}

func (r *reader) info() Info { return r.infoLike("") }

// infoLike is an info whose name is likely to be known.
func (r *reader) infoLike(name string) Info {
	var info Info
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "name":
			info.Name = r.textLike(name)
			got |= 1
		case "kind":
			info.Kind = r.kind()
			got |= 2
		case "parent":
			info.Parent = r.text()
		case "labels":
			info.Labels = r.labels()
		case "created":
			info.Created = r.integer()
		case "updated":
			info.Updated = r.integer()
		default:
			r.skip(0)
		}
	}
	r.required(got, 3, "an info")
	return info
}

func (r *reader) kind() Kind {
	word := r.field()
	switch string(word) {
	case "view":
		return View
	case "active":
		return Active
	case "committed":
		return Committed
	default:
		r.fail(fmt.Errorf("unknown kind %.40q", word))
		return ""
	}
}

func (r *reader) mount() Mount {
	var mount Mount
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "type":
			mount.Type = r.text()
			got |= 1
		case "source":
			mount.Source = r.text()
			got |= 2
		case "options":
			mount.Options = r.texts()
		case "target":
			mount.Target = r.text()
		default:
			r.skip(0)
		}
	}
	r.required(got, 3, "a mount")
	return mount
}

func (r *reader) mounts() Mounts {
	var mounts Mounts
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "mounts":
			left := r.array()
			mounts.Mounts = make([]Mount, 0, min(left, 1024))
			for ; left > 0 && r.err == nil; left-- {
				mounts.Mounts = append(mounts.Mounts, r.mount())
			}
			got |= 1
		case "fence":
			mounts.Fence = r.integer()
		default:
			r.skip(0)
		}
	}
	r.required(got, 1, "an answer of mounts")
	return mounts
}

func (r *reader) usage() Usage {
	var usage Usage
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "inodes":
			usage.Inodes = r.integer()
		case "size":
			usage.Size = r.integer()
		default:
			r.skip(0)
		}
	}
	return usage
}

func (r *reader) empty() struct{} {
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		r.field()
		r.skip(0)
	}
	return struct{}{}
}

func (r *reader) walkPage() WalkPage {
	var page WalkPage
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "infos":
			left := r.array()
			page.Infos = make([]Info, 0, min(left, PageMax))
			for ; left > 0 && r.err == nil; left-- {
				page.Infos = append(page.Infos, r.info())
			}
		case "sequence":
			page.Sequence = r.integer()
		case "next":
			page.next = r.text()
		default:
			r.skip(0)
		}
	}
	return page
}

func (r *reader) boolean() bool {
	value, rest, err := msgp.ReadBoolBytes(r.rest)
	r.take(rest, err)
	return value
}

func (r *reader) finding() Finding {
	var finding Finding
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "kind":
			finding.Kind = r.text()
			got |= 1
		case "severity":
			finding.Severity = r.text()
			got |= 2
		case "message":
			finding.Message = r.text()
			got |= 4
		case "advice":
			finding.Advice = r.text()
			got |= 8
		case "namespace":
			finding.Namespace = r.text()
		case "key":
			finding.Key = r.text()
		case "id":
			finding.ID = r.integer()
		case "path":
			finding.Path = r.text()
		case "sequence":
			finding.Sequence = r.integer()
		case "time":
			finding.Time = r.integer()
		case "inodes":
			finding.Inodes = r.integer()
		case "size":
			finding.Size = r.integer()
		case "repair":
			finding.Repair = r.text()
		case "mended":
			finding.Mended = r.boolean()
		case "failure":
			finding.Failure = r.text()
		default:
			r.skip(0)
		}
	}
	r.required(got, 15, "a finding")
	return finding
}

func (r *reader) auditPage() AuditPage {
	var page AuditPage
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "findings":
			left := r.array()
			page.Findings = make([]Finding, 0, min(left, PageMax))
			for ; left > 0 && r.err == nil; left-- {
				page.Findings = append(page.Findings, r.finding())
			}
		case "next":
			page.next = r.text()
		case "looked":
			page.Looked = r.integer()
		default:
			r.skip(0)
		}
	}
	return page
}

func (r *reader) mountUse() MountUse {
	var use MountUse
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "point":
			use.Point = r.text()
			got |= 1
		case "type":
			use.Type = r.text()
			got |= 2
		case "pid":
			use.PID = r.integer()
		case "process":
			use.Process = r.text()
		default:
			r.skip(0)
		}
	}
	r.required(got, 3, "a mount that uses a snapshot")
	return use
}

func (r *reader) why() WhyAnswer {
	var why WhyAnswer
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "info":
			if why.Info = nil; !r.absent() {
				info := r.info()
				why.Info = &info
			}
		case "id":
			why.ID = r.integer()
		case "fence":
			why.Fence = r.integer()
		case "broken":
			why.Broken = r.boolean()
		case "children":
			why.Children = r.texts()
		case "children_count":
			why.ChildrenCount = r.integer()
		case "holds":
			why.Holds = r.texts()
		case "mounts":
			why.Mounts = nil
			for left := r.array(); left > 0 && r.err == nil; left-- {
				why.Mounts = append(why.Mounts, r.mountUse())
			}
		case "references":
			why.References = r.texts()
		case "events":
			why.Events = nil
			for left := r.array(); left > 0 && r.err == nil; left-- {
				why.Events = append(why.Events, r.event())
			}
		case "oldest":
			why.Oldest = r.integer()
		default:
			r.skip(0)
		}
	}
	return why
}

func (r *reader) eventsPage() eventsPage {
	var page eventsPage
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "events":
			left := r.array()
			page.events = make([]Event, 0, min(left, PageMax))
			for ; left > 0 && r.err == nil; left-- {
				page.events = append(page.events, r.event())
			}
		case "next":
			page.next = r.integer()
		case "newest":
			page.newest = r.integer()
		default:
			r.skip(0)
		}
	}
	return page
}

func (r *reader) event() Event {
	var event Event
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "sequence":
			event.Sequence = r.integer()
			got |= 1
		case "previous":
			event.Previous = r.integer()
			got |= 2
		case "time":
			event.Time = r.integer()
			got |= 4
		case "snapshotter":
			event.Snapshotter = r.textLike(r.before.Snapshotter)
			got |= 8
		case "namespace":
			event.Namespace = r.textLike(r.before.Namespace)
			got |= 16
		case "verb":
			event.Verb = r.verb()
			got |= 32
		case "key":
			event.Key = r.text()
		case "info":
			if event.Info = nil; !r.absent() {
				info := r.infoLike(event.Key)
				event.Info = &info
			}
		default:
			r.skip(0)
		}
	}
	r.required(got, 63, "an event")
	r.before = event
	return event
}

// verb is one of few words, which need no copy each.
func (r *reader) verb() string {
	word, _, err := msgp.ReadStringZC(r.rest)
	if err == nil {
		for _, known := range eventVerbs {
			if string(word) == known {
				return r.textLike(known)
			}
		}
	}
	return r.text()
}

func (r *reader) heartbeat() heartbeat {
	var beat heartbeat
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "sequence":
			beat.sequence = r.integer()
			got |= 1
		case "previous":
			beat.previous = r.integer()
			got |= 2
		case "time":
			beat.time = r.integer()
			got |= 4
		case "topics":
			if beat.topics = nil; !r.absent() {
				beat.topics = r.integers()
			}
		default:
			r.skip(0)
		}
	}
	r.required(got, 7, "a heartbeat")
	return beat
}

func (r *reader) snapshotterStatus() SnapshotterStatus {
	var status SnapshotterStatus
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "name":
			status.Name = r.text()
			got |= 1
		case "backend":
			status.Backend = r.text()
			got |= 2
		case "state":
			status.State = r.text()
			got |= 4
		case "pid":
			status.PID = r.integer()
		case "restarts":
			status.Restarts = r.integer()
		case "resident_bytes":
			status.ResidentBytes = r.integer()
		case "cpu_seconds":
			status.CPUSeconds = r.float()
		case "open_files":
			status.OpenFiles = r.integer()
		case "sequence":
			status.Sequence = r.integer()
		case "snapshots":
			status.Snapshots = r.integer()
		case "capabilities":
			status.Capabilities = r.texts()
		case "root":
			status.Root = r.text()
		case "queues":
			status.Queues = r.queues()
		case "backlog":
			status.Backlog = r.integers()
		default:
			r.skip(0)
		}
	}
	r.required(got, 7, "a snapshotter's status")
	return status
}

func (r *reader) status() Status {
	var status Status
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "version":
			status.Version = r.text()
			got |= 1
		case "pid":
			status.PID = r.integer()
			got |= 2
		case "uptime_seconds":
			status.UptimeSeconds = r.float()
			got |= 4
		case "resident_bytes":
			status.ResidentBytes = r.integer()
			got |= 8
		case "endpoint":
			status.Endpoint = r.text()
			got |= 16
		case "events_endpoint":
			status.EventsEndpoint = r.text()
			got |= 32
		case "queues":
			status.Queues = r.queues()
		case "snapshotters":
			left := r.array()
			status.Snapshotters = make([]SnapshotterStatus, 0, min(left, 64))
			for ; left > 0 && r.err == nil; left-- {
				status.Snapshotters = append(status.Snapshotters, r.snapshotterStatus())
			}
		default:
			r.skip(0)
		}
	}
	r.required(got, 63, "a status")
	return status
}

func (r *reader) progress() Progress {
	var progress Progress
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "entries":
			progress.Entries = r.integer()
		case "bytes":
			progress.Bytes = r.integer()
		default:
			r.skip(0)
		}
	}
	return progress
}

func (r *reader) fault() *Error {
	sent := &Error{}
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "code":
			sent.Code = Code(r.text())
			got |= 1
		case "message":
			sent.Message = r.text()
			got |= 2
		case "details":
			sent.Details = r.details(0)
		default:
			r.skip(0)
		}
	}
	r.required(got, 3, "a fault")
	return sent
}

// outcome of the call with this number: an answer, still encoded, an error or progress.
type outcome struct {
	call     int64
	ok       []byte
	error    *Error
	progress *Progress
}

func (r *reader) outcome() outcome {
	var one outcome
	var got uint
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "call":
			one.call = r.integer()
			got |= 1
		case "ok":
			one.ok = r.raw()
		case "error":
			if one.error = nil; !r.absent() {
				one.error = r.fault()
			}
		case "progress":
			if one.progress = nil; !r.absent() {
				progress := r.progress()
				one.progress = &progress
			}
		default:
			r.skip(0)
		}
	}
	r.required(got, 1, "an outcome")
	return one
}

// reply is one part of it: outcomes, or one error for the request as a whole.
type reply struct {
	outcomes []outcome
	error    *Error
}

func (r *reader) reply() reply {
	var part reply
	for n := r.mapping(); n > 0 && r.err == nil; n-- {
		switch string(r.field()) {
		case "outcomes":
			left := r.array()
			part.outcomes = make([]outcome, 0, min(left, CallsMax))
			for ; left > 0 && r.err == nil; left-- {
				part.outcomes = append(part.outcomes, r.outcome())
			}
		case "error":
			if part.error = nil; !r.absent() {
				part.error = r.fault()
			}
		default:
			r.skip(0)
		}
	}
	return part
}

// normalise has codes that nobody knows mean what the specification says they do.
func (r *reply) normalise() {
	if r.error != nil {
		r.error.normalise()
	}
	for i := range r.outcomes {
		if err := r.outcomes[i].error; err != nil {
			err.normalise()
		}
	}
}

// decode reads the whole body with one of the functions above.
func decode[T any](body []byte, read func(*reader) T, what string) (T, error) {
	return decodeLike(body, read, what, nil)
}

// decodeLike is decode for a message that is likely to have texts of the event before it, and keeps it for the next.
func decodeLike[T any](body []byte, read func(*reader) T, what string, before *Event) (T, error) {
	r := reader{rest: body}
	if before != nil {
		r.before = *before
	}
	value := read(&r)
	if before != nil && r.err == nil {
		*before = r.before
	}
	if r.err == nil && len(r.rest) > 0 {
		r.fail(errTrailing)
	}
	if r.err != nil {
		var zero T
		return zero, malformed(what, r.err)
	}
	return value, nil
}

// replyFrames takes a reply apart: the request's id, whether this is its last part, and the body.
func replyFrames(frames [][]byte) (id string, last bool, body []byte, ok bool) {
	if len(frames) != 4 || string(frames[0]) != string(requestVersion) || len(frames[2]) != 1 || frames[2][0] > 1 {
		return "", false, nil, false
	}
	return string(frames[1]), frames[2][0] == 1, frames[3], true
}

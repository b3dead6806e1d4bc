package snapbroker

import (
	"slices"

	"github.com/tinylib/msgp/msgp"
)

// The writing half of the wire: a call is encoded where it is made, once, and a request is a head, calls side by side,
// and a tail. Fields have the order of the specification, defaults are left out, integers take the fewest bytes.

var (
	requestVersion = []byte("SNBR\x01")
	eventVersion   = []byte("SNBE\x01")
	partMore       = []byte{0}
	partLast       = []byte{1}
)

const (
	pageDefault   = 1000
	creditDefault = 16
)

type verb uint8

const (
	verbPrepare verb = iota
	verbView
	verbCommit
	verbRemove
	verbMounts
	verbStat
	verbUpdate
	verbUsage
	verbWalk
	verbCleanup
	verbEvents
	verbAudit
	verbRepair
	verbWhy
	verbCancel
	verbStatus
)

var verbNames = [...]string{
	"prepare", "view", "commit", "remove", "mounts", "stat", "update", "usage", "walk", "cleanup", "events", "audit",
	"repair", "why", "cancel", "status",
}

func (v verb) String() string { return verbNames[v] }

// changes says whether a call must not be done twice: a request with one carries a token.
func (v verb) changes() bool {
	return v == verbPrepare || v == verbView || v == verbCommit || v == verbRemove || v == verbUpdate
}

// reads says whether a call is answered at once, so that smaller requests serve it better.
func (v verb) reads() bool { return v == verbStat || v == verbMounts || v == verbUsage }

// message appends the fields of a map whose number is known when all are there.
type message struct {
	body   []byte
	head   int
	fields byte
}

// begin opens a map of at most 15 fields.
func begin(body []byte) message { return message{body: append(body, 0x80), head: len(body)} }

func (m *message) key(name string) {
	m.fields++
	m.body = msgp.AppendString(m.body, name)
}

func (m *message) text(name, value string) {
	m.key(name)
	m.body = msgp.AppendString(m.body, value)
}

func (m *message) textIf(name, value string) {
	if value != "" {
		m.text(name, value)
	}
}

func (m *message) integer(name string, value int64) {
	m.key(name)
	m.body = appendInteger(m.body, value)
}

func (m *message) integerUnless(name string, value, unless int64) {
	if value != unless {
		m.integer(name, value)
	}
}

func (m *message) trueIf(name string, value bool) {
	if value {
		m.key(name)
		m.body = msgp.AppendBool(m.body, true)
	}
}

func (m *message) bytesIf(name string, value []byte) {
	if len(value) > 0 {
		m.key(name)
		m.body = msgp.AppendBytes(m.body, value)
	}
}

func (m *message) textsIf(name string, values []string) {
	if len(values) > 0 {
		m.key(name)
		m.body = msgp.AppendArrayHeader(m.body, uint32(len(values)))
		for _, value := range values {
			m.body = msgp.AppendString(m.body, value)
		}
	}
}

func (m *message) labelsIf(labels []label) {
	if len(labels) > 0 {
		m.key("labels")
		m.body = msgp.AppendMapHeader(m.body, uint32(len(labels)))
		for _, one := range labels {
			m.body = msgp.AppendString(m.body, one.key)
			m.body = msgp.AppendString(m.body, one.value)
		}
	}
}

// end closes the map; answers the body it was begun on, with it.
func (m *message) end() []byte {
	m.body[m.head] |= m.fields
	return m.body
}

// appendInteger takes the fewest bytes; the library writes numbers from 128 up with a sign, which takes more.
func appendInteger(body []byte, value int64) []byte {
	if value < 0 {
		return msgp.AppendInt64(body, value)
	}
	return msgp.AppendUint64(body, uint64(value))
}

type label struct{ key, value string }

// sorted makes the same bytes of the same labels, always: a token stands for the calls' bytes.
func (l Labels) sorted() []label {
	if len(l) == 0 {
		return nil
	}
	pairs := make([]label, 0, len(l))
	for key, value := range l {
		pairs = append(pairs, label{key, value})
	}
	slices.SortFunc(pairs, func(a, b label) int {
		if a.key < b.key {
			return -1
		}
		return 1
	})
	return pairs
}

// call has the fields of every verb; each verb writes its own.
type call struct {
	verb       verb
	key        string
	name       string
	parent     string
	labels     []label
	fieldpaths []string
	sync       bool
	fence      int64
	filters    []string // of a walk, or the topics of events
	after      string
	since      int64
	page       int64
	credit     int64
	follow     bool
	execute    bool
	request    []byte
	calls      []int
}

func (c *call) append(body []byte) []byte {
	m := begin(body)
	m.text("verb", c.verb.String())
	switch c.verb {
	case verbPrepare, verbView:
		m.text("key", c.key)
		m.textIf("parent", c.parent)
		m.labelsIf(c.labels)
	case verbCommit:
		m.text("name", c.name)
		m.text("key", c.key)
		m.textIf("parent", c.parent)
		m.labelsIf(c.labels)
		m.trueIf("sync", c.sync)
		m.integerUnless("fence", c.fence, 0)
	case verbRemove, verbMounts:
		m.text("key", c.key)
		m.integerUnless("fence", c.fence, 0)
	case verbStat, verbUsage, verbWhy:
		m.text("key", c.key)
	case verbUpdate:
		m.text("name", c.name)
		m.labelsIf(c.labels)
		m.textsIf("fieldpaths", c.fieldpaths)
	case verbWalk:
		m.textsIf("filters", c.filters)
		m.textIf("after", c.after)
		m.integerUnless("page", c.page, pageDefault)
		m.integerUnless("credit", c.credit, creditDefault)
	case verbEvents:
		m.integer("since", c.since)
		m.textsIf("topics", c.filters)
		m.integerUnless("page", c.page, pageDefault)
		m.integerUnless("credit", c.credit, creditDefault)
		m.trueIf("follow", c.follow)
	case verbAudit, verbRepair:
		m.trueIf("execute", c.execute)
		m.textIf("after", c.after)
		m.integerUnless("page", c.page, pageDefault)
		m.integerUnless("credit", c.credit, creditDefault)
	case verbCancel:
		m.key("request")
		m.body = msgp.AppendBytes(m.body, c.request)
		if len(c.calls) > 0 {
			m.key("calls")
			m.body = msgp.AppendArrayHeader(m.body, uint32(len(c.calls)))
			for _, number := range c.calls {
				m.body = appendInteger(m.body, int64(number))
			}
		}
	}
	return m.end()
}

// encode answers the call's bytes; an error where they cannot be sent.
func (c *call) encode() ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, err
	}
	return c.append(make([]byte, 0, 64+len(c.key)+len(c.name)+len(c.parent)+len(c.after))), nil
}

// check finds what would spoil the whole request at the broker, in which other callers' calls travel too.
func (c *call) check() error {
	fixed := [...]struct{ value, what string }{
		{c.key, "key"}, {c.name, "name"}, {c.parent, "parent"}, {c.after, "after"},
	}
	for _, one := range fixed {
		if err := checkText(one.value, one.what); err != nil {
			return err
		}
	}
	for _, one := range c.labels {
		if err := checkText(one.key, "a label's key"); err != nil {
			return err
		}
		if err := checkText(one.value, "label"); err != nil {
			return err
		}
	}
	for _, values := range [...][]string{c.fieldpaths, c.filters} {
		for _, value := range values {
			if err := checkText(value, "field path, filter or topic"); err != nil {
				return err
			}
		}
	}
	if c.fence < 0 {
		return invalid("fence must be the number that prepare or view answered, or 0, not %d", c.fence)
	}
	return nil
}

// headBytesMax is what a request takes beside its calls: names of fields, namespace, timeout and token.
const headBytesMax = 256

// appendRequest appends the body of a request whose calls are encoded already.
func appendRequest(body []byte, calls [][]byte, namespace string, atomic bool, timeoutMS int64, token []byte) []byte {
	m := begin(body)
	m.key("calls")
	m.body = msgp.AppendArrayHeader(m.body, uint32(len(calls)))
	for _, one := range calls {
		m.body = append(m.body, one...)
	}
	m.textIf("namespace", namespace)
	m.trueIf("atomic", atomic)
	m.integerUnless("timeout_ms", timeoutMS, 0)
	m.bytesIf("token", token)
	return m.end()
}

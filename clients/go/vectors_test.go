package snapbroker

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/tinylib/msgp/msgp"
)

type vector struct {
	Name   string
	Type   string
	Hex    string
	JSON   json.RawMessage
	Error  string
	SameAs string `json:"same_as"`
	Steps  []struct {
		Direction string
		Frames    []string
	}
	Refuses string
}

func (v *vector) body(t testing.TB) []byte { return unhex(t, v.Hex) }

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	body, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return body
}

type vectors struct {
	Messages, Tolerated, Malformed, Refused, Exchanges []vector
}

func golden(t testing.TB) *vectors {
	t.Helper()
	text, err := os.ReadFile("../vectors/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var all vectors
	if err := json.Unmarshal(text, &all); err != nil {
		t.Fatal(err)
	}
	for name, section := range map[string][]vector{
		"messages": all.Messages, "tolerated": all.Tolerated, "malformed": all.Malformed, "refused": all.Refused,
		"exchanges": all.Exchanges,
	} {
		if len(section) == 0 {
			t.Fatalf("no %s among the vectors", name)
		}
	}
	return &all
}

// codecs: what reads and what writes each type. A client writes requests and reads the rest; the other halves are the
// test's own, made of the same parts.
var codecs = map[string]struct {
	read  func(body []byte) (any, error)
	write func(w *writer, value any)
}{
	"Request":      {reads((*reader).request), writes((*writer).request)},
	"Reply":        {reads((*reader).reply), writes((*writer).reply)},
	"MountsAnswer": {reads((*reader).mounts), writes((*writer).mounts)},
	"Empty":        {reads((*reader).empty), writes(func(w *writer, _ struct{}) { w.begin(); w.end() })},
	"Info":         {reads((*reader).info), writes((*writer).info)},
	"Usage":        {reads((*reader).usage), writes((*writer).usage)},
	"WalkPage":     {reads((*reader).walkPage), writes((*writer).walkPage)},
	"EventsPage":   {reads((*reader).eventsPage), writes((*writer).eventsPage)},
	"AuditPage":    {reads((*reader).auditPage), writes((*writer).auditPage)},
	"WhyAnswer":    {reads((*reader).why), writes((*writer).why)},
	"StatusAnswer": {reads((*reader).status), writes((*writer).status)},
	"Event":        {reads((*reader).event), writes((*writer).event)},
	"Heartbeat":    {reads((*reader).heartbeat), writes((*writer).heartbeat)},
}

func reads[T any](read func(*reader) T) func([]byte) (any, error) {
	return func(body []byte) (any, error) { return decode(body, read, "vector") }
}

func writes[T any](write func(*writer, T)) func(*writer, any) {
	return func(w *writer, value any) { write(w, value.(T)) }
}

func TestVectorsOfMessages(t *testing.T) {
	all := golden(t)
	for _, v := range slices.Concat(all.Messages, all.Refused) {
		t.Run(v.Name, func(t *testing.T) {
			codec, known := codecs[v.Type]
			if !known {
				t.Fatalf("no codec for %s", v.Type)
			}
			body := v.body(t)
			value, err := codec.read(body)
			if err != nil {
				t.Fatal(err)
			}
			compare(t, v.Type, reflect.ValueOf(value), parse(t, v.JSON))
			w := newWriter()
			codec.write(w, value)
			if !bytes.Equal(w.body, body) {
				t.Errorf("written as\n%x, not as\n%x", w.body, body)
			}
		})
	}
}

func TestVectorsThatAreTolerated(t *testing.T) {
	all := golden(t)
	for _, v := range all.Tolerated {
		t.Run(v.Name, func(t *testing.T) {
			codec := codecs[v.Type]
			value, err := codec.read(v.body(t))
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(all.Messages, func(other vector) bool { return other.Name == v.SameAs })
			w := newWriter()
			codec.write(w, value)
			if want := all.Messages[i].body(t); !bytes.Equal(w.body, want) {
				t.Errorf("written as\n%x, not as\n%x", w.body, want)
			}
		})
	}
}

func TestVectorsThatAreMalformed(t *testing.T) {
	for _, v := range golden(t).Malformed {
		t.Run(v.Name, func(t *testing.T) {
			value, err := codecs[v.Type].read(v.body(t))
			if !errors.Is(err, ErrInternal) {
				t.Errorf("read as %+v, %v", value, err)
			}
		})
	}
}

func TestVectorsOfExchanges(t *testing.T) {
	for _, v := range golden(t).Exchanges {
		t.Run(v.Name, func(t *testing.T) {
			tracker, err := newTracker("overlayfs", "default", []string{"overlayfs/"}, 0, silenceDefault)
			if err != nil {
				t.Fatal(err)
			}
			tracker.beginAt(0)
			for _, step := range v.Steps {
				frames := make([][]byte, 0, len(step.Frames))
				for _, text := range step.Frames {
					frames = append(frames, unhex(t, text))
				}
				switch step.Direction {
				case "subscriber-to-broker":
					if got := "\x01" + tracker.subscriptions()[0]; got != string(frames[0]) {
						t.Errorf("subscribed with %q, not %q", got, frames[0])
					}
				case "broker-to-subscriber":
					before := tracker.position
					event, ok, err := tracker.feed(frames)
					if err != nil || tracker.behind || tracker.statistics.Malformed > 0 {
						t.Errorf("%v: %+v", err, tracker)
					}
					if ok && event.Sequence != before+1 {
						t.Errorf("event %d after %d", event.Sequence, before)
					}
				case "broker-to-client":
					exchangeReply(t, frames)
				case "client-to-broker":
					exchangeRequest(t, v.Name, frames)
				default:
					t.Errorf("unknown direction %s", step.Direction)
				}
			}
		})
	}
}

func exchangeReply(t *testing.T, frames [][]byte) {
	id, last, body, ok := replyFrames(frames)
	if !ok {
		t.Fatalf("no reply: %x", frames)
	}
	if id != string(frames[1]) || last != (frames[2][0] == 1) {
		t.Errorf("id %x, last %t of %x", id, last, frames)
	}
	if _, err := decode(body, (*reader).reply, "reply"); err != nil {
		t.Error(err)
	}
}

func exchangeRequest(t *testing.T, name string, frames [][]byte) {
	if strings.HasPrefix(name, "dropped-") || name == "exchange-unsupported-version" {
		return // Nothing that this client writes.
	}
	if !bytes.Equal(frames[0], requestVersion) {
		t.Errorf("version %x", frames[0])
	}
	value, err := decode(frames[3], (*reader).request, "request")
	if err != nil {
		t.Fatal(err)
	}
	if w := newWriter(); true {
		if w.request(value); !bytes.Equal(w.body, frames[3]) {
			t.Errorf("written as %x, not %x", w.body, frames[3])
		}
	}
}

// compare holds what was read against the JSON view, field by field: fields are found by their names, and a field that
// the view lacks has to be zero.
func compare(t *testing.T, where string, value reflect.Value, view any) {
	t.Helper()
	for value.Kind() == reflect.Pointer || value.Kind() == reflect.Interface {
		value = value.Elem()
	}
	switch view := view.(type) {
	case map[string]any:
		if value.Type() == reflect.TypeFor[[]label]() {
			pairs := map[string]string{}
			for i := range value.Len() {
				pairs[value.Index(i).Field(0).String()] = value.Index(i).Field(1).String()
			}
			value = reflect.ValueOf(pairs)
		}
		if value.Kind() == reflect.Map {
			if value.Len() != len(view) {
				t.Errorf("%s: %d entries, not %d", where, value.Len(), len(view))
			}
			for key, entry := range view {
				found := value.MapIndex(reflect.ValueOf(key))
				if !found.IsValid() {
					t.Errorf("%s lacks %q", where, key)
					continue
				}
				compare(t, where+"."+key, found, entry)
			}
			return
		}
		if value.Kind() == reflect.Slice && value.Type().Elem() == reflect.TypeFor[byte]() {
			// An answer that is still encoded.
			var text bytes.Buffer
			if _, err := msgp.UnmarshalAsJSON(&text, value.Bytes()); err != nil {
				t.Error(err)
			}
			if got := parse(t, text.Bytes()); !reflect.DeepEqual(got, any(view)) {
				t.Errorf("%s: %v, not %v", where, got, view)
			}
			return
		}
		seen := map[string]bool{}
		for key, entry := range view {
			field := goField(value.Type(), key)
			if field == "" {
				t.Errorf("%s: %s has no field for %q", where, value.Type(), key)
				continue
			}
			seen[field] = true
			compare(t, where+"."+key, value.FieldByName(field), entry)
		}
		for i := range value.NumField() {
			if name := value.Type().Field(i).Name; !seen[name] && !value.Field(i).IsZero() {
				if kind := value.Field(i).Kind(); kind != reflect.Slice && kind != reflect.Map || value.Field(i).Len() > 0 {
					if !defaulted[name] {
						t.Errorf("%s.%s is %v, and absent in the view", where, name, value.Field(i))
					}
				}
			}
		}
	case []any:
		if value.Len() != len(view) {
			t.Fatalf("%s: %d entries, not %d", where, value.Len(), len(view))
		}
		for i, entry := range view {
			compare(t, fmt.Sprintf("%s[%d]", where, i), value.Index(i), entry)
		}
	default:
		if got, want := fmt.Sprint(plain(value)), fmt.Sprint(view); got != want {
			t.Errorf("%s is %s, not %s", where, got, want)
		}
	}
}

// defaulted are fields whose default is not zero.
var defaulted = map[string]bool{"page": true, "credit": true, "cause": true}

func plain(value reflect.Value) any {
	switch value.Kind() {
	case reflect.Invalid:
		return nil
	case reflect.Float32:
		return value.Float()
	case reflect.Interface:
		return plain(value.Elem())
	case reflect.String:
		return value.String()
	case reflect.Bool:
		return value.Bool()
	case reflect.Float64:
		return value.Float()
	case reflect.Slice:
		text, _ := json.Marshal(value.Bytes())
		return strings.Trim(string(text), `"`)
	case reflect.Uint64:
		return value.Uint()
	case reflect.Uint8:
		return verb(value.Uint()).String()
	default:
		return value.Int()
	}
}

func goField(of reflect.Type, key string) string {
	wanted := strings.ReplaceAll(key, "_", "")
	if key == "topics" && of == reflect.TypeFor[call]() {
		wanted = "filters"
	}
	for i := range of.NumField() {
		if name := of.Field(i).Name; strings.EqualFold(name, wanted) {
			return name
		}
	}
	return ""
}

func parse(t testing.TB, text []byte) any {
	t.Helper()
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		t.Fatal(err)
	}
	return numbers(value)
}

// numbers writes floats and integers alike as they are printed.
func numbers(value any) any {
	switch value := value.(type) {
	case map[string]any:
		for key, entry := range value {
			value[key] = numbers(entry)
		}
	case []any:
		for i, entry := range value {
			value[i] = numbers(entry)
		}
	case json.Number:
		if f, err := value.Float64(); err == nil && strings.ContainsAny(value.String(), ".eE") {
			return fmt.Sprint(f)
		}
		return value.String()
	}
	return value
}

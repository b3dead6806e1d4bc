package snapbroker

import (
	"bytes"
	"encoding/json"
)

// JSON as the command `snapbroker --json` prints it: every field is there, in one order. Use an Encoder with
// SetEscapeHTML(false) to have names as they are.

func marshal(value any) ([]byte, error) {
	var buffer bytes.Buffer
	encoder := json.NewEncoder(&buffer)
	encoder.SetEscapeHTML(false)
	err := encoder.Encode(value)
	return bytes.TrimSuffix(buffer.Bytes(), []byte("\n")), err
}

// MarshalJSON writes {} where there are none.
func (l Labels) MarshalJSON() ([]byte, error) {
	if l == nil {
		return []byte("{}"), nil
	}
	return marshal(map[string]string(l))
}

// MarshalJSON writes every field, options as [] where there are none.
func (m Mount) MarshalJSON() ([]byte, error) {
	options := m.Options
	if options == nil {
		options = []string{}
	}
	return marshal(struct {
		Type    string   `json:"type"`
		Source  string   `json:"source"`
		Options []string `json:"options"`
		Target  string   `json:"target"`
	}{m.Type, m.Source, options, m.Target})
}

// MarshalJSON writes every field and the topic, info as null where there is none.
func (e Event) MarshalJSON() ([]byte, error) {
	return marshal(struct {
		Sequence    int64  `json:"sequence"`
		Previous    int64  `json:"previous"`
		Time        int64  `json:"time"`
		Snapshotter string `json:"snapshotter"`
		Namespace   string `json:"namespace"`
		Verb        string `json:"verb"`
		Key         string `json:"key"`
		Info        *Info  `json:"info"`
		Topic       string `json:"topic"`
	}{e.Sequence, e.Previous, e.Time, e.Snapshotter, e.Namespace, e.Verb, e.Key, e.Info, e.Topic()})
}

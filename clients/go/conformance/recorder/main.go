// Command recorder writes down what a mirror of each namespace hears of the broker: see tests/conformance/README.md.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	snapbroker "github.com/snapbroker/snapbroker-go"
)

const last = "conformance-end"

type object = map[string]any

func main() {
	// What ends a wait for the broker is its return, or SIGTERM.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := record(ctx, os.Args[1:]); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, "recorder:", err)
		os.Exit(1)
	}
}

// output writes lines, one at a time.
type output struct {
	mutex   sync.Mutex
	encoder *json.Encoder
}

func (o *output) line(fields object) error {
	o.mutex.Lock()
	defer o.mutex.Unlock()
	return o.encoder.Encode(fields)
}

func record(ctx context.Context, namespaces []string) error {
	if len(namespaces) == 0 {
		return errors.New("name the namespaces: recorder NAMESPACE [NAMESPACE]")
	}
	client, err := snapbroker.Dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	out := &output{encoder: json.NewEncoder(os.Stdout)}
	out.encoder.SetEscapeHTML(false)
	mirrors := make([]*snapbroker.Mirror, len(namespaces))
	first := make([]snapbroker.Change, len(namespaces))
	for i, namespace := range namespaces {
		view, err := client.In("", namespace)
		if err != nil {
			return err
		}
		if mirrors[i], err = open(ctx, view); err != nil {
			return err
		}
		defer mirrors[i].Close()
		if first[i], err = next(ctx, mirrors[i]); err != nil {
			return err
		}
		if err := state(out, namespace, mirrors[i], first[i]); err != nil {
			return err
		}
	}
	if err := out.line(object{"ready": true}); err != nil {
		return err
	}
	failures := make(chan error, len(namespaces))
	for i, namespace := range namespaces {
		go func() { failures <- follow(ctx, out, namespace, mirrors[i]) }()
	}
	for range namespaces {
		if err := <-failures; err != nil {
			return err
		}
	}
	return nil
}

func open(ctx context.Context, view *snapbroker.Client) (*snapbroker.Mirror, error) {
	for {
		mirror, err := view.Mirror(ctx)
		if err == nil || !errors.Is(err, snapbroker.ErrUnavailable) {
			return mirror, err
		}
	}
}

// next outlives a broker that is away for longer than the client's own timeout.
func next(ctx context.Context, mirror *snapbroker.Mirror) (snapbroker.Change, error) {
	for {
		change, err := mirror.Next(ctx)
		if err == nil || !errors.Is(err, snapbroker.ErrUnavailable) {
			return change, err
		}
	}
}

func state(out *output, namespace string, mirror *snapbroker.Mirror, change snapbroker.Change) error {
	return out.line(object{"namespace": namespace, "state": mirror.Snapshots(), "sequence": change.Sequence})
}

// follow writes what happens in one namespace until its end.
func follow(ctx context.Context, out *output, namespace string, mirror *snapbroker.Mirror) error {
	for {
		if _, found := mirror.Get(last); found {
			gaps := mirror.Statistics().Gaps
			return out.line(object{"namespace": namespace, "mirror": mirror.Snapshots(), "gaps": gaps})
		}
		change, err := next(ctx, mirror)
		if err != nil {
			return err
		}
		if change.Event == nil {
			err = state(out, namespace, mirror, change)
		} else {
			err = out.line(object{"namespace": namespace, "event": change.Event})
		}
		if err != nil {
			return err
		}
	}
}

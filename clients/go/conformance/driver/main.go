// Command driver does what the conformance harness tells it, line by line: see tests/conformance/README.md.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	snapbroker "github.com/snapbroker/snapbroker-go"
)

type object = map[string]any

// step has the fields of every step; one that is absent is its zero value, or nil where that would mean something.
type step struct {
	ID               *int64            `json:"id"`
	Do               string            `json:"do"`
	Snapshotter      string            `json:"snapshotter"`
	Namespace        string            `json:"namespace"`
	TimeoutMS        int64             `json:"timeout_ms"`
	Endpoint         string            `json:"endpoint"`
	EventsEndpoint   string            `json:"events_endpoint"`
	ConnectTimeoutMS int64             `json:"connect_timeout_ms"`
	PatienceMS       *int64            `json:"patience_ms"`
	Key              string            `json:"key"`
	Name             string            `json:"name"`
	Parent           string            `json:"parent"`
	Labels           snapbroker.Labels `json:"labels"`
	Sync             bool              `json:"sync"`
	Fence            int64             `json:"fence"`
	Fieldpaths       []string          `json:"fieldpaths"`
	Filters          []string          `json:"filters"`
	Page             *int              `json:"page"`
	Since            int64             `json:"since"`
	Topics           []string          `json:"topics"`
	Count            *int              `json:"count"`
	Calls            []step            `json:"calls"`
	Atomic           bool              `json:"atomic"`
	Prefix           string            `json:"prefix"`
	Callers          int               `json:"callers"`
}

func main() {
	if len(os.Args) > 1 {
		fail(fmt.Errorf("unknown argument %q", os.Args[1]))
	}
	client, err := snapbroker.Dial(context.Background())
	if err != nil {
		fail(err)
	}
	d := &driver{client: client, out: json.NewEncoder(os.Stdout)}
	d.out.SetEscapeHTML(false)
	if err := d.run(os.Stdin); err != nil {
		fail(err)
	}
	if err := d.client.Close(); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "driver:", err)
	os.Exit(1)
}

type driver struct {
	client *snapbroker.Client
	out    *json.Encoder
}

func (d *driver) run(in io.Reader) error {
	if err := d.out.Encode(object{"ready": "go"}); err != nil {
		return err
	}
	lines := bufio.NewReaderSize(in, 1<<20)
	for {
		line, err := lines.ReadBytes('\n')
		if len(bytes.TrimSpace(line)) > 0 {
			if err := d.step(line); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (d *driver) step(line []byte) error {
	var s step
	decoder := json.NewDecoder(bytes.NewReader(line))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&s); err != nil {
		return err
	}
	if s.ID == nil {
		return errors.New("a step without id")
	}
	ok, err := d.do(&s)
	var told *snapbroker.Error
	switch {
	case err == nil:
		return d.out.Encode(object{"id": *s.ID, "ok": ok})
	case errors.As(err, &told):
		return d.out.Encode(object{"id": *s.ID, "error": view(told)})
	}
	return err
}

func view(err *snapbroker.Error) object {
	details := err.Details
	if details == nil {
		details = object{}
	}
	return object{"code": err.Code, "details": details, "in_doubt": err.InDoubt}
}

func mounts(m snapbroker.Mounts) object {
	if m.Mounts == nil {
		m.Mounts = []snapbroker.Mount{}
	}
	return object{"mounts": m.Mounts, "fence": m.Fence}
}

func (d *driver) do(s *step) (any, error) {
	if s.Do == "open" {
		return object{}, d.open(s)
	}
	client := d.client
	if s.Snapshotter != "" || s.Namespace != "" {
		var err error
		if client, err = d.client.In(s.Snapshotter, s.Namespace); err != nil {
			return nil, err
		}
	}
	ctx := context.Background()
	if s.TimeoutMS > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(s.TimeoutMS)*time.Millisecond)
		defer cancel()
	}
	switch s.Do {
	case "walk":
		return walk(ctx, client, s)
	case "cleanup":
		return object{}, client.Cleanup(ctx)
	case "events":
		return events(ctx, client, s)
	case "status":
		status, err := client.Status(ctx)
		names := []string{}
		for _, one := range status.Snapshotters {
			names = append(names, one.Name)
		}
		slices.Sort(names)
		return object{"snapshotters": names}, err
	case "batch":
		return batch(ctx, client, s)
	case "together":
		return together(ctx, client, s)
	case "churn":
		return churn(ctx, client, s)
	}
	return call(ctx, client, s)
}

func (d *driver) open(s *step) error {
	given := []snapbroker.Option{
		snapbroker.WithEndpoint(s.Endpoint), snapbroker.WithEventsEndpoint(s.EventsEndpoint),
		snapbroker.WithNamespace(s.Namespace), snapbroker.WithSnapshotter(s.Snapshotter),
	}
	if s.TimeoutMS > 0 {
		given = append(given, snapbroker.WithTimeout(time.Duration(s.TimeoutMS)*time.Millisecond))
	}
	if s.ConnectTimeoutMS > 0 {
		given = append(given, snapbroker.WithConnectTimeout(time.Duration(s.ConnectTimeoutMS)*time.Millisecond))
	}
	if s.PatienceMS != nil {
		given = append(given, snapbroker.WithPatience(time.Duration(*s.PatienceMS)*time.Millisecond))
	}
	if err := d.client.Close(); err != nil {
		return err
	}
	client, err := snapbroker.Dial(context.Background(), given...)
	if err == nil {
		d.client = client
	}
	return err
}

// call makes one of the calls that a batch may have too.
func call(ctx context.Context, client *snapbroker.Client, s *step) (any, error) {
	switch s.Do {
	case "prepare":
		answer, err := client.Prepare(ctx, s.Key, s.Parent, snapbroker.WithLabels(s.Labels))
		return mounts(answer), err
	case "view":
		answer, err := client.View(ctx, s.Key, s.Parent, snapbroker.WithLabels(s.Labels))
		return mounts(answer), err
	case "commit":
		return object{}, client.Commit(ctx, s.Name, s.Key, commitOptions(s)...)
	case "remove":
		return object{}, client.Remove(ctx, s.Key, snapbroker.WithFence(s.Fence))
	case "mounts":
		answer, err := client.Mounts(ctx, s.Key, snapbroker.WithFence(s.Fence))
		return mounts(answer), err
	case "stat":
		return client.Stat(ctx, s.Key)
	case "update":
		return client.Update(ctx, s.Name, s.Labels, s.Fieldpaths...)
	case "usage":
		return client.Usage(ctx, s.Key)
	}
	return nil, fmt.Errorf("unknown step %q", s.Do)
}

func commitOptions(s *step) []snapbroker.CommitOption {
	given := []snapbroker.CommitOption{snapbroker.WithLabels(s.Labels), snapbroker.WithFence(s.Fence)}
	if s.Parent != "" {
		given = append(given, snapbroker.WithParent(s.Parent))
	}
	if s.Sync {
		given = append(given, snapbroker.WithSync())
	}
	return given
}

func walk(ctx context.Context, client *snapbroker.Client, s *step) (any, error) {
	var given []snapbroker.WalkOption
	if s.Page != nil {
		given = append(given, snapbroker.WithPage(*s.Page))
	}
	infos, sequence, err := client.List(ctx, s.Filters, given...)
	if infos == nil {
		infos = []snapbroker.Info{}
	}
	return object{"infos": infos, "sequence": sequence}, err
}

func events(ctx context.Context, client *snapbroker.Client, s *step) (any, error) {
	found := []snapbroker.Event{}
	if s.Count == nil {
		for event, err := range client.Journal(ctx, s.Since, s.Topics...) {
			if err != nil {
				return nil, err
			}
			found = append(found, event)
		}
		return object{"events": found}, nil
	}
	subscriber, err := client.Subscribe(ctx, snapbroker.WithSince(s.Since), snapbroker.WithTopics(s.Topics...))
	if err != nil {
		return nil, err
	}
	defer subscriber.Close()
	for len(found) < *s.Count {
		event, err := subscriber.Next(ctx)
		if err != nil {
			return nil, err
		}
		found = append(found, event)
	}
	return object{"events": found}, nil
}

// result is what the harness is told of one call.
func result(ok any, err error) (object, error) {
	var told *snapbroker.Error
	switch {
	case err == nil:
		return object{"ok": ok}, nil
	case errors.As(err, &told):
		return object{"error": view(told)}, nil
	}
	return nil, err
}

func batch(ctx context.Context, client *snapbroker.Client, s *step) (any, error) {
	b := client.Batch()
	if s.Atomic {
		b = client.AtomicBatch()
	}
	outcomes := make([]func() (any, error), 0, len(s.Calls))
	for i := range s.Calls {
		outcome, err := join(b, &s.Calls[i])
		if err != nil {
			return nil, err
		}
		outcomes = append(outcomes, outcome)
	}
	if err := b.Send(ctx); err != nil && b.Refused() {
		return nil, err
	}
	results := make([]object, 0, len(outcomes))
	for _, outcome := range outcomes {
		one, err := result(outcome())
		if err != nil {
			return nil, err
		}
		results = append(results, one)
	}
	return object{"results": results}, nil
}

// join adds a call to the batch; answers what has its outcome afterwards.
func join(b *snapbroker.Batch, s *step) (func() (any, error), error) {
	nothing := func(r *snapbroker.Result[struct{}]) func() (any, error) {
		return func() (any, error) { _, err := r.Get(); return object{}, err }
	}
	ofMounts := func(r *snapbroker.Result[snapbroker.Mounts]) func() (any, error) {
		return func() (any, error) { m, err := r.Get(); return mounts(m), err }
	}
	switch s.Do {
	case "prepare":
		return ofMounts(b.Prepare(s.Key, s.Parent, snapbroker.WithLabels(s.Labels))), nil
	case "view":
		return ofMounts(b.View(s.Key, s.Parent, snapbroker.WithLabels(s.Labels))), nil
	case "commit":
		return nothing(b.Commit(s.Name, s.Key, commitOptions(s)...)), nil
	case "remove":
		return nothing(b.Remove(s.Key, snapbroker.WithFence(s.Fence))), nil
	case "mounts":
		return ofMounts(b.Mounts(s.Key, snapbroker.WithFence(s.Fence))), nil
	case "stat":
		r := b.Stat(s.Key)
		return func() (any, error) { return r.Get() }, nil
	case "update":
		r := b.Update(s.Name, s.Labels, s.Fieldpaths...)
		return func() (any, error) { return r.Get() }, nil
	case "usage":
		r := b.Usage(s.Key)
		return func() (any, error) { return r.Get() }, nil
	}
	return nil, fmt.Errorf("unknown call %q of a batch", s.Do)
}

func together(ctx context.Context, client *snapbroker.Client, s *step) (any, error) {
	results := make([]object, len(s.Calls))
	failures := make([]error, len(s.Calls))
	var wait sync.WaitGroup
	for i := range s.Calls {
		wait.Add(1)
		go func() {
			defer wait.Done()
			results[i], failures[i] = result(call(ctx, client, &s.Calls[i]))
		}()
	}
	wait.Wait()
	return object{"results": results}, errors.Join(failures...)
}

func churn(ctx context.Context, client *snapbroker.Client, s *step) (any, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var calls, next atomic.Int64
	var wait sync.WaitGroup
	failures := make(chan error, s.Callers)
	for range s.Callers {
		wait.Add(1)
		go func() {
			defer wait.Done()
			for i := next.Add(1) - 1; i < int64(*s.Count) && ctx.Err() == nil; i = next.Add(1) - 1 {
				if err := workspace(ctx, client, s, i, &calls); err != nil {
					failures <- err
					cancel()
					return
				}
			}
		}()
	}
	wait.Wait()
	select {
	case err := <-failures:
		return nil, err
	default:
		return object{"calls": calls.Load()}, nil
	}
}

func workspace(ctx context.Context, client *snapbroker.Client, s *step, i int64, calls *atomic.Int64) error {
	key := s.Prefix + "-" + strconv.FormatInt(i, 10)
	made, err := client.Prepare(ctx, key, s.Parent)
	if err != nil {
		return err
	}
	calls.Add(1)
	if i%3 == 0 {
		err = client.Remove(ctx, key, snapbroker.WithFence(made.Fence))
	} else {
		err = client.Commit(ctx, key+"-made", key, snapbroker.WithFence(made.Fence))
	}
	if err != nil {
		return err
	}
	calls.Add(1)
	if i%3 == 2 {
		if err := client.Remove(ctx, key+"-made"); err != nil {
			return err
		}
		calls.Add(1)
	}
	return nil
}

// Command bench measures the client against a broker that the conformance harness has made ready: see
// tests/conformance/README.md.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	snapbroker "github.com/snapbroker/snapbroker-go"
)

const eventWait = 60 * time.Second

func main() {
	endpoint := flag.String("endpoint", "", "the router's endpoint")
	events := flag.String("events-endpoint", "", "the publisher's endpoint")
	snapshotter := flag.String("snapshotter", "", "which snapshotter")
	namespace := flag.String("namespace", "", "whose snapshots")
	work := flag.String("work", "", "latency, throughput or events")
	seconds := flag.Float64("seconds", 1, "how long to measure")
	callers := flag.Int("callers", 1, "callers at once")
	flag.Parse()
	if flag.NArg() > 0 {
		fail(fmt.Errorf("unknown argument %q", flag.Arg(0)))
	}
	ctx := context.Background()
	client, err := snapbroker.Dial(ctx, snapbroker.WithEndpoint(*endpoint), snapbroker.WithEventsEndpoint(*events),
		snapbroker.WithSnapshotter(*snapshotter), snapbroker.WithNamespace(*namespace))
	if err != nil {
		fail(err)
	}
	length := time.Duration(*seconds * float64(time.Second))
	switch *work {
	case "latency":
		err = latency(ctx, client, length)
	case "throughput":
		err = throughput(ctx, client, length, *callers)
	case "events":
		err = receive(ctx, client)
	default:
		err = fmt.Errorf("unknown work %q", *work)
	}
	if err = errors.Join(err, client.Close()); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}

func report(line any) error { return json.NewEncoder(os.Stdout).Encode(line) }

func latency(ctx context.Context, client *snapbroker.Client, length time.Duration) error {
	var took []time.Duration
	begin := time.Now().Add(length / 10)
	end := begin.Add(length)
	for now := time.Now(); now.Before(end); {
		if _, err := client.Stat(ctx, "bench"); err != nil {
			return err
		}
		after := time.Now()
		if !now.Before(begin) {
			took = append(took, after.Sub(now))
		}
		now = after
	}
	if len(took) == 0 {
		return errors.New("no call was answered in time")
	}
	measured := time.Since(begin)
	slices.Sort(took)
	return report(struct {
		Work    string  `json:"work"`
		Calls   int     `json:"calls"`
		Seconds float64 `json:"seconds"`
		P50     float64 `json:"p50_ms"`
		P99     float64 `json:"p99_ms"`
	}{"latency", len(took), measured.Seconds(), milliseconds(took[len(took)/2]), milliseconds(took[len(took)*99/100])})
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func throughput(ctx context.Context, client *snapbroker.Client, length time.Duration, callers int) error {
	var calls atomic.Int64
	var wait sync.WaitGroup
	failures := make(chan error, callers)
	begin := time.Now().Add(length / 10)
	end := begin.Add(length)
	for range callers {
		wait.Add(1)
		go func() {
			defer wait.Done()
			counted := int64(0)
			for now := time.Now(); now.Before(end); now = time.Now() {
				if _, err := client.Stat(ctx, "bench"); err != nil {
					failures <- err
					return
				}
				if now.After(begin) {
					counted++
				}
			}
			calls.Add(counted)
		}()
	}
	wait.Wait()
	measured := time.Since(begin).Seconds()
	select {
	case err := <-failures:
		return err
	default:
	}
	return report(struct {
		Work      string  `json:"work"`
		Calls     int64   `json:"calls"`
		Seconds   float64 `json:"seconds"`
		PerSecond float64 `json:"per_second"`
	}{"throughput", calls.Load(), measured, float64(calls.Load()) / measured})
}

func receive(ctx context.Context, client *snapbroker.Client) error {
	subscriber, err := client.Subscribe(ctx)
	if err != nil {
		return err
	}
	defer subscriber.Close()
	if err := report(map[string]bool{"ready": true}); err != nil {
		return err
	}
	// One context for the whole: a timer for each event would be measured as well.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watchdog := time.AfterFunc(eventWait, cancel)
	defer watchdog.Stop()
	events := 0
	var first time.Time
	for event, err := range subscriber.Events(ctx) {
		if err != nil {
			return err
		}
		if events == 0 {
			first = time.Now()
		}
		events++
		if events%1024 == 0 {
			watchdog.Reset(eventWait)
		}
		if event.Key == "bench-end" {
			break
		}
	}
	measured := time.Since(first).Seconds()
	return report(struct {
		Work      string  `json:"work"`
		Events    int     `json:"events"`
		Seconds   float64 `json:"seconds"`
		PerSecond float64 `json:"per_second"`
		Gaps      uint64  `json:"gaps"`
	}{"events", events, measured, float64(events) / measured, subscriber.Statistics().Gaps})
}

// Command tail prints the events of a snapshotter as JSON lines.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"iter"
	"os"
	"os/signal"
	"syscall"

	snapbroker "github.com/snapbroker/snapbroker-go"
)

const usage = `usage: tail [--since N] [--follow] [TOPIC...]

The events above sequence N as JSON lines: all that the journal still has where no N is given. TOPIC is a prefix of
topics; without one, those of SNAPBROKER_NAMESPACE.

  --since N  begin above this sequence
  --follow   go on with those that come
`

func main() {
	flags := flag.NewFlagSet("tail", flag.ContinueOnError)
	flags.SetOutput(os.Stderr)
	flags.Usage = func() {}
	since := flags.Int64("since", -1, "")
	follow := flags.Bool("follow", false, "")
	switch err := flags.Parse(os.Args[1:]); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
		return
	case err != nil:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	given := false
	flags.Visit(func(f *flag.Flag) { given = given || f.Name == "since" })
	if given && *since < 0 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := tail(ctx, *since, given, *follow, flags.Args())
	var told *snapbroker.Error
	switch {
	case err == nil || ctx.Err() != nil:
	case errors.As(err, &told):
		fmt.Fprintln(os.Stderr, "tail:", err)
		os.Exit(told.Code.ExitStatus())
	default:
		fmt.Fprintln(os.Stderr, "tail: internal:", err)
		os.Exit(1)
	}
}

func tail(ctx context.Context, since int64, given, follow bool, topics []string) error {
	client, err := snapbroker.Dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	// A broker that is not there at the start is an error; one that goes away later is waited for.
	if _, err := client.Status(ctx); err != nil {
		return err
	}
	out := json.NewEncoder(os.Stdout)
	out.SetEscapeHTML(false)
	if !given {
		since = 0
	}
	err = print(ctx, client, out, since, follow, topics)
	var refused *snapbroker.Error
	if !given && errors.As(err, &refused) && refused.Code == snapbroker.CodeOutOfRange {
		if oldest, ok := refused.Details["oldest"].(int64); ok {
			return print(ctx, client, out, oldest-1, follow, topics)
		}
	}
	return err
}

func print(
	ctx context.Context, client *snapbroker.Client, out *json.Encoder, since int64, follow bool, topics []string,
) error {
	events := client.Journal(ctx, since, topics...)
	if follow {
		subscriber, err := client.Subscribe(ctx, snapbroker.WithSince(since), snapbroker.WithTopics(topics...))
		if err != nil {
			return err
		}
		defer subscriber.Close()
		events = patiently(ctx, subscriber)
	}
	for event, err := range events {
		if err != nil {
			return err
		}
		if err := out.Encode(event); err != nil {
			return err
		}
	}
	return nil
}

// patiently goes on where the broker was away for longer than the client waits.
func patiently(ctx context.Context, subscriber *snapbroker.Subscriber) iter.Seq2[snapbroker.Event, error] {
	return func(yield func(snapbroker.Event, error) bool) {
		for {
			event, err := subscriber.Next(ctx)
			if errors.Is(err, snapbroker.ErrUnavailable) {
				continue
			}
			if !yield(event, err) || err != nil {
				return
			}
		}
	}
}

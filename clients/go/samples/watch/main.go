// Command watch prints what exists in a namespace, and how it changes: a live mirror, across gaps and restarts.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	snapbroker "github.com/snapbroker/snapbroker-go"
)

const usage = `usage: watch

A live mirror of what exists in SNAPBROKER_NAMESPACE, printed as it changes.
`

func main() {
	if len(os.Args) == 2 && (os.Args[1] == "--help" || os.Args[1] == "-h") {
		fmt.Print(usage)
		return
	}
	if len(os.Args) > 1 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := watch(ctx)
	var told *snapbroker.Error
	switch {
	case err == nil || ctx.Err() != nil:
	case errors.As(err, &told):
		fmt.Fprintln(os.Stderr, "watch:", err)
		os.Exit(told.Code.ExitStatus())
	default:
		fmt.Fprintln(os.Stderr, "watch: internal:", err)
		os.Exit(1)
	}
}

func watch(ctx context.Context) error {
	client, err := snapbroker.Dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	// A broker that is not there at the start is an error; one that goes away later is waited for.
	if _, err := client.Status(ctx); err != nil {
		return err
	}
	mirror, err := client.Mirror(ctx)
	if err != nil {
		return err
	}
	defer mirror.Close()
	first := true
	for {
		change, err := mirror.Next(ctx)
		switch {
		case errors.Is(err, snapbroker.ErrUnavailable):
			continue // It comes back, and then nothing was missed.
		case err != nil:
			return err
		case change.Event != nil:
			if !change.Known {
				print(line(change.Event))
			}
			continue
		case first:
			for _, info := range mirror.Snapshots() {
				print("= " + describe(info))
			}
		default:
			differences(change.Before, mirror)
		}
		first = false
		print(fmt.Sprintf("-- %d snapshots at %d", mirror.Len(), change.Sequence))
	}
}

// print writes one line, whole.
func print(line string) {
	if line != "" {
		_, _ = os.Stdout.WriteString(line + "\n")
	}
}

func line(event *snapbroker.Event) string {
	switch event.Verb {
	case "prepare", "view":
		return "+ " + describe(*event.Info)
	case "commit":
		return "> " + describe(*event.Info) + " from " + quote(event.Key)
	case "update":
		return "~ " + describe(*event.Info) + " " + quote(event.Info.Labels)
	case "remove":
		return "- " + quote(event.Key)
	}
	return ""
}

func describe(info snapbroker.Info) string {
	text := string(info.Kind) + " " + quote(info.Name)
	if info.Parent != "" {
		text += " on " + quote(info.Parent)
	}
	return text
}

// quote writes JSON in which only what must be is escaped.
func quote(value any) string {
	var text strings.Builder
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		return err.Error()
	}
	return strings.TrimSuffix(text.String(), "\n")
}

// differences prints what changed between two walks, whose events nobody has any more.
func differences(before map[string]snapbroker.Info, mirror *snapbroker.Mirror) {
	for _, name := range slices.Sorted(maps.Keys(before)) {
		if _, found := mirror.Get(name); !found {
			print("- " + quote(name))
		}
	}
	for _, info := range mirror.Snapshots() {
		if _, found := before[info.Name]; !found {
			print("+ " + describe(info))
		}
	}
	for _, info := range mirror.Snapshots() {
		old, found := before[info.Name]
		if found && (old.Kind != info.Kind || old.Parent != info.Parent || !maps.Equal(old.Labels, info.Labels)) {
			print("~ " + describe(info) + " " + quote(info.Labels))
		}
	}
}

// Command farm makes workspaces from one base, uses and commits them, the way a build farm does it.
package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	snapbroker "github.com/snapbroker/snapbroker-go"
)

const usage = `usage: farm [--count 100] [--callers 16] [--base NAME] [--prefix P] [--keep] [--json]

Workspaces from one base, used and committed. As root they are mounted and written to.

  --count N    how many workspaces
  --callers N  how many at a time
  --base NAME  a committed snapshot to make them from; else one is made
  --prefix P   what the names of all snapshots begin with
  --keep       leave what was made
  --json       print the summary as JSON
`

type farm struct {
	client  *snapbroker.Client
	count   int
	callers int
	base    string
	ownBase bool
	prefix  string
	mounted bool
	json    bool

	mutex sync.Mutex
	made  []string // what there is of this run

	prepare, use, commit []time.Duration
}

func main() {
	f := farm{mounted: os.Geteuid() == 0}
	flags := flag.NewFlagSet("farm", flag.ContinueOnError)
	flags.Usage = func() {}
	flags.IntVar(&f.count, "count", 100, "")
	flags.IntVar(&f.callers, "callers", 16, "")
	flags.StringVar(&f.base, "base", "", "")
	flags.StringVar(&f.prefix, "prefix", "", "")
	keep := flags.Bool("keep", false, "")
	flags.BoolVar(&f.json, "json", false, "")
	err := flags.Parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		fmt.Print(usage)
		return
	}
	if err != nil || flags.NArg() > 0 || f.count < 1 || f.callers < 1 || !plain(f.prefix) {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	err = f.run(context.Background(), *keep)
	var told *snapbroker.Error
	switch {
	case errors.As(err, &told):
		fmt.Fprintln(os.Stderr, "farm:", told)
		os.Exit(told.Code.ExitStatus())
	case err != nil:
		fmt.Fprintln(os.Stderr, "farm: internal:", err)
		os.Exit(1)
	}
}

func (f *farm) run(ctx context.Context, keep bool) (err error) {
	if f.client, err = snapbroker.Dial(ctx); err != nil {
		return err
	}
	defer func() { _ = f.client.Close() }()
	if f.prefix == "" {
		var random [4]byte
		if _, err := rand.Read(random[:]); err != nil {
			return err
		}
		f.prefix = "farm-" + hex.EncodeToString(random[:])
	}
	if !keep {
		defer func() { err = cmp.Or(err, f.cleanUp(ctx)) }()
	}
	if f.base == "" {
		if err := f.makeBase(ctx); err != nil {
			return err
		}
	}
	begin := time.Now()
	if err := f.work(ctx); err != nil {
		return err
	}
	took := time.Since(begin)
	done, _, err := f.client.List(ctx, []string{fmt.Sprintf("labels.farm==%s,kind==committed", quote(f.prefix))})
	if err == nil && len(done) != f.count {
		err = fmt.Errorf("%d snapshots are there, not %d", len(done), f.count)
	}
	if err != nil {
		return err
	}
	return f.summary(took)
}

// makeBase commits a snapshot with one file.
func (f *farm) makeBase(ctx context.Context) error {
	f.base, f.ownBase = f.prefix+"-base", true
	making := f.base + "-making"
	mounts, err := f.client.Prepare(ctx, making, "")
	if err != nil {
		return err
	}
	f.note(making, "")
	err = f.inside(mounts, func(root string) error {
		return os.WriteFile(filepath.Join(root, "base.txt"), []byte("the base of "+f.prefix+"\n"), 0o644)
	})
	if err != nil {
		return err
	}
	err = f.client.Commit(ctx, f.base, making, snapbroker.WithSync(), snapbroker.WithFence(mounts.Fence))
	if err == nil {
		f.note(f.base, making)
	}
	return err
}

// work makes all workspaces, some at a time.
func (f *farm) work(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	f.prepare = make([]time.Duration, f.count)
	f.use = make([]time.Duration, f.count)
	f.commit = make([]time.Duration, f.count)
	var next atomic.Int64
	var wait sync.WaitGroup
	for range min(f.callers, f.count) {
		wait.Add(1)
		go func() {
			defer wait.Done()
			for i := int(next.Add(1)) - 1; i < f.count && ctx.Err() == nil; i = int(next.Add(1)) - 1 {
				if err := f.workspace(ctx, i); err != nil {
					cancel(err)
				}
			}
		}()
	}
	wait.Wait()
	return context.Cause(ctx)
}

func (f *farm) workspace(ctx context.Context, i int) error {
	labels := snapbroker.WithLabels(snapbroker.Labels{"farm": f.prefix})
	key := fmt.Sprintf("%s-%d", f.prefix, i)
	begin := time.Now()
	mounts, err := f.client.Prepare(ctx, key, f.base, labels)
	if err != nil {
		return err
	}
	f.note(key, "")
	prepared := time.Now()
	if err := f.inside(mounts, func(root string) error { return f.build(root, i) }); err != nil {
		return err
	}
	used := time.Now()
	if err := f.client.Commit(ctx, key+"-done", key, labels, snapbroker.WithFence(mounts.Fence)); err != nil {
		return err
	}
	f.note(key+"-done", key)
	f.prepare[i], f.use[i], f.commit[i] = prepared.Sub(begin), used.Sub(prepared), time.Since(used)
	return nil
}

func (f *farm) build(root string, i int) error {
	if f.ownBase {
		text, err := os.ReadFile(filepath.Join(root, "base.txt"))
		if err == nil && string(text) != "the base of "+f.prefix+"\n" {
			err = fmt.Errorf("the base holds %q", text)
		}
		if err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(root, "result.txt"), fmt.Appendf(nil, "workspace %d\n", i), 0o644)
}

// inside mounts a workspace, has something done in it, and unmounts it.
func (f *farm) inside(mounts snapbroker.Mounts, work func(root string) error) (err error) {
	if !f.mounted {
		return nil
	}
	root, err := os.MkdirTemp("", "farm-")
	if err != nil {
		return err
	}
	defer func() { err = cmp.Or(err, os.Remove(root)) }()
	for _, one := range mounts.Mounts {
		target := filepath.Join(root, one.Target)
		flags, data := mountOptions(one.Options)
		if err := syscall.Mount(one.Source, target, one.Type, flags, data); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
		defer func() { err = cmp.Or(err, syscall.Unmount(target, 0)) }()
		// A bind mount takes no other flag: read-only is a second step.
		if flags&syscall.MS_BIND != 0 && flags&syscall.MS_RDONLY != 0 {
			if err := syscall.Mount("", target, "", flags|syscall.MS_REMOUNT, ""); err != nil {
				return fmt.Errorf("remount %s: %w", target, err)
			}
		}
	}
	return work(root)
}

// mountOptions tells the words of mount(8) that are flags from those that are the filesystem's.
func mountOptions(options []string) (flags uintptr, data string) {
	words := map[string]uintptr{
		"ro": syscall.MS_RDONLY, "rw": 0, "bind": syscall.MS_BIND, "rbind": syscall.MS_BIND | syscall.MS_REC,
		"nosuid": syscall.MS_NOSUID, "nodev": syscall.MS_NODEV, "noexec": syscall.MS_NOEXEC,
		"noatime": syscall.MS_NOATIME, "relatime": syscall.MS_RELATIME,
	}
	var rest []string
	for _, option := range options {
		if flag, known := words[option]; known {
			flags |= flag
		} else {
			rest = append(rest, option)
		}
	}
	return flags, strings.Join(rest, ",")
}

// cleanUp removes what this run made, children before their parent, and waits until it is gone.
func (f *farm) cleanUp(ctx context.Context) error {
	if len(f.made) == 0 {
		return nil // Maybe there is not even a broker.
	}
	var failed error
	for _, name := range slices.Backward(f.made) {
		failed = cmp.Or(failed, f.client.Remove(ctx, name))
	}
	return cmp.Or(failed, f.client.Cleanup(ctx))
}

// plain says whether a prefix has only what needs no quoting anywhere.
func plain(prefix string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	return strings.Trim(prefix, letters+"0123456789._-") == ""
}

// note keeps that a snapshot of this run is there, under its first key or then its name.
func (f *farm) note(name, instead string) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.made = append(slices.DeleteFunc(f.made, func(other string) bool { return other == instead }), name)
}

type figures struct {
	Median float64 `json:"median"`
	Max    float64 `json:"max"`
}

func measured(took []time.Duration) figures {
	sorted := slices.Sorted(slices.Values(took))
	round := func(d time.Duration) float64 { return math.Round(d.Seconds()*1e5) / 100 }
	return figures{round(sorted[len(sorted)/2]), round(sorted[len(sorted)-1])}
}

func (f *farm) summary(took time.Duration) error {
	prepare, use, commit := measured(f.prepare), measured(f.use), measured(f.commit)
	if !f.mounted {
		use = figures{}
	}
	rate := math.Round(float64(f.count)/took.Seconds()*10) / 10
	seconds := math.Round(took.Seconds()*100) / 100
	if f.json {
		out := json.NewEncoder(os.Stdout)
		out.SetEscapeHTML(false)
		return out.Encode(struct {
			Workspaces int     `json:"workspaces"`
			Callers    int     `json:"callers"`
			Base       string  `json:"base"`
			Mounted    bool    `json:"mounted"`
			Prepare    figures `json:"prepare_ms"`
			Use        figures `json:"use_ms"`
			Commit     figures `json:"commit_ms"`
			Seconds    float64 `json:"seconds"`
			PerSecond  float64 `json:"per_second"`
		}{f.count, f.callers, f.base, f.mounted, prepare, use, commit, seconds, rate})
	}
	how := "mounted"
	if !f.mounted {
		how = "not mounted (needs root)"
	}
	fmt.Printf("workspaces  %d from %s, %d at a time, %s\n", f.count, quote(f.base), f.callers, how)
	for _, row := range []struct {
		name string
		took figures
	}{{"prepare", prepare}, {"use", use}, {"commit", commit}} {
		fmt.Printf("%-10s  median %.2f ms, slowest %.2f ms\n", row.name, row.took.Median, row.took.Max)
	}
	_, err := fmt.Printf("total       %.2f s, %.1f workspaces a second\n", seconds, rate)
	return err
}

// quote writes a JSON string, which is also what a filter takes for a quoted value.
func quote(text string) string {
	var quoted strings.Builder
	encoder := json.NewEncoder(&quoted)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(text); err != nil {
		return err.Error()
	}
	return strings.TrimSuffix(quoted.String(), "\n")
}

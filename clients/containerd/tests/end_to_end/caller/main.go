// Command caller does to a chain of layers what programs written against containerd do: it asks containerd's
// snapshots service through containerd's own client code, and mounts through containerd's own mount code.
//
// It prepares key on parent, mounts what it gets at target, writes a file, unmounts, removes the snapshot, and prints
// what it saw as one JSON document.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// kept keeps the snapshot from containerd's garbage collector.
const kept = "containerd.io/gc.root"

type options struct {
	address, namespace, snapshotter, key, parent, target string
}

// seen is what is printed: the names found in the mounted root, how many lower directories the mounts had, and how
// long their options were.
type seen struct {
	Entries []string `json:"entries"`
	Layers  int      `json:"layers"`
	Bytes   int      `json:"option_bytes"`
}

func main() {
	var o options
	flag.StringVar(&o.address, "address", "", "containerd's socket")
	flag.StringVar(&o.namespace, "namespace", "", "containerd's namespace")
	flag.StringVar(&o.snapshotter, "snapshotter", "", "containerd's name of the snapshotter")
	flag.StringVar(&o.key, "key", "", "the key to prepare")
	flag.StringVar(&o.parent, "parent", "", "the parent to prepare it on")
	flag.StringVar(&o.target, "target", "", "an empty directory to mount at")
	flag.Parse()
	found, err := run(namespaces.WithNamespace(context.Background(), o.namespace), o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "caller:", err)
		os.Exit(1)
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		fmt.Fprintln(os.Stderr, "caller:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (found seen, err error) {
	conn, err := grpc.NewClient("unix://"+o.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return found, err
	}
	defer conn.Close()
	snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), o.snapshotter)
	mounts, err := snapshotter.Prepare(ctx, o.key, o.parent, snapshots.WithLabels(map[string]string{kept: "test"}))
	if err != nil {
		return found, fmt.Errorf("prepare: %w", err)
	}
	defer func() { err = errors.Join(err, snapshotter.Remove(ctx, o.key)) }()
	if err := mount.All(mounts, o.target); err != nil {
		return found, fmt.Errorf("mount: %w", err)
	}
	defer func() { err = errors.Join(err, mount.UnmountAll(o.target, 0)) }()
	if err := os.WriteFile(filepath.Join(o.target, "written"), []byte("by the caller\n"), 0o644); err != nil {
		return found, err
	}
	entries, err := os.ReadDir(o.target)
	if err != nil {
		return found, err
	}
	for _, entry := range entries {
		found.Entries = append(found.Entries, entry.Name())
	}
	for _, m := range mounts {
		for _, option := range m.Options {
			found.Bytes += len(option)
			if lower, ok := strings.CutPrefix(option, "lowerdir="); ok {
				found.Layers += strings.Count(lower, ":") + 1
			}
		}
	}
	return found, nil
}

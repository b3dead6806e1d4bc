package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	leases "github.com/containerd/containerd/api/services/leases/v1"
	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
)

// kept is what keeps a snapshot from containerd's garbage collector, which runs on its own after some changes.
// A label is the cheapest way: a lease is one more record for every call.
var kept = map[string]string{"containerd.io/gc.root": "bench"}

// work is one operation: the call that is measured and the one that warms up.
type work struct {
	call func(caller, number int) error
	warm func(caller, number int) error
}

// session is what the calls share.
type session struct {
	options
	ctx     context.Context
	clients []snapshots.SnapshotsClient
}

func newSession(ctx context.Context, o options, connections []*grpc.ClientConn) *session {
	s := &session{options: o, ctx: ctx}
	for _, connection := range connections {
		s.clients = append(s.clients, snapshots.NewSnapshotsClient(connection))
	}
	return s
}

func newWork(ctx context.Context, o options, connections []*grpc.ClientConn) (work, error) {
	s := newSession(ctx, o, connections)
	reading := func(call func(caller int, key string) error) work {
		read := func(caller, number int) error { return call(caller, s.key(number%s.keys)) }
		return work{call: read, warm: read}
	}
	switch o.operation {
	case "prepare", "fill":
		return work{
			call: func(caller, number int) error { return s.prepare(caller, s.key(number), s.parent) },
			warm: func(caller, number int) error { return s.prepare(caller, "warm-"+s.key(number), s.parent) },
		}, nil
	case "cycle":
		return work{
			call: func(caller, number int) error { return s.cycle(caller, s.key(number)) },
			warm: func(caller, number int) error { return s.cycle(caller, "warm-"+s.key(number)) },
		}, nil
	case "drop":
		return work{
			call: func(caller, number int) error { return s.remove(caller, s.key(number)) },
			warm: func(int, int) error { return errors.New("a removal has no -warmup") },
		}, nil
	case "chain":
		return work{
			call: func(_, number int) error { return s.link(number) },
			warm: func(int, int) error { return errors.New("a chain has no -warmup") },
		}, nil
	case "stat":
		return reading(s.stat), nil
	case "mounts":
		return reading(s.mounts), nil
	case "usage":
		return reading(s.usage), nil
	case "walk":
		walk := func(caller, _ int) error { return s.walk(caller) }
		return work{call: walk, warm: walk}, nil
	}
	return work{}, fmt.Errorf("unknown -operation %q", o.operation)
}

func (s *session) key(number int) string {
	return fmt.Sprintf("%s-%d", s.prefix, number)
}

func (s *session) client(caller int) snapshots.SnapshotsClient {
	return s.clients[caller%len(s.clients)]
}

func (s *session) prepare(caller int, key, parent string) error {
	_, err := s.client(caller).Prepare(s.ctx, &snapshots.PrepareSnapshotRequest{
		Snapshotter: s.snapshotter, Key: key, Parent: parent, Labels: kept,
	})
	return err
}

func (s *session) commit(caller int, name, key string) error {
	_, err := s.client(caller).Commit(s.ctx, &snapshots.CommitSnapshotRequest{
		Snapshotter: s.snapshotter, Name: name, Key: key, Labels: kept,
	})
	return err
}

func (s *session) remove(caller int, key string) error {
	_, err := s.client(caller).Remove(s.ctx, &snapshots.RemoveSnapshotRequest{
		Snapshotter: s.snapshotter, Key: key,
	})
	return err
}

// cycle is the life of a layer: prepared, committed, removed.
func (s *session) cycle(caller int, key string) error {
	if err := s.prepare(caller, key, s.parent); err != nil {
		return err
	}
	if err := s.commit(caller, key+"-committed", key); err != nil {
		return err
	}
	return s.remove(caller, key+"-committed")
}

// link adds one committed layer to a chain; layer 0 lies on the parent given. Meant for one caller.
func (s *session) link(number int) error {
	parent := s.parent
	if number > 0 {
		parent = s.key(number - 1)
	}
	if err := s.prepare(0, s.key(number)+"-active", parent); err != nil {
		return err
	}
	return s.commit(0, s.key(number), s.key(number)+"-active")
}

func (s *session) stat(caller int, key string) error {
	_, err := s.client(caller).Stat(s.ctx, &snapshots.StatSnapshotRequest{Snapshotter: s.snapshotter, Key: key})
	return err
}

func (s *session) mounts(caller int, key string) error {
	_, err := s.client(caller).Mounts(s.ctx, &snapshots.MountsRequest{Snapshotter: s.snapshotter, Key: key})
	return err
}

func (s *session) usage(caller int, key string) error {
	_, err := s.client(caller).Usage(s.ctx, &snapshots.UsageRequest{Snapshotter: s.snapshotter, Key: key})
	return err
}

// walk reads the whole list and checks that nothing is missing.
func (s *session) walk(caller int) error {
	stream, err := s.client(caller).List(s.ctx, &snapshots.ListSnapshotsRequest{Snapshotter: s.snapshotter})
	if err != nil {
		return err
	}
	count := 0
	for {
		page, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		count += len(page.Info)
	}
	if count < s.keys {
		return fmt.Errorf("the walk gave %d infos, at least %d were expected", count, s.keys)
	}
	return nil
}

// settle waits for a garbage collection, which is when containerd's snapshotters remove what Remove took away.
func settle(ctx context.Context, o options, connection *grpc.ClientConn) (report, error) {
	client := leases.NewLeasesClient(connection)
	once := load{callers: 1, operations: 1}
	result, err := once.run(func(int, int) error {
		created, err := client.Create(ctx, &leases.CreateRequest{ID: "bench-settle"})
		if err != nil {
			return err
		}
		_, err = client.Delete(ctx, &leases.DeleteRequest{ID: created.Lease.ID, Sync: true})
		return err
	})
	return result.report(o), err
}

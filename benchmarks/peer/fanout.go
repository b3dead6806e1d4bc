package main

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	events "github.com/containerd/containerd/api/services/events/v1"
	"google.golang.org/grpc"
)

const (
	// fanoutTimeout is how long a subscriber may take to receive what was published.
	fanoutTimeout = 30 * time.Second
	// fanoutPoll is how often the count of what has arrived is looked at.
	fanoutPoll = 200 * time.Microsecond
)

// subscriber counts the events of one subscription.
type subscriber struct {
	received atomic.Int64
	failed   atomic.Pointer[error]
}

// subscribe opens a subscription of its own to the snapshots' events of the namespace.
func subscribe(ctx context.Context, o options, connection *grpc.ClientConn) (*subscriber, error) {
	filter := fmt.Sprintf(`topic~="^/snapshot/prepare",namespace==%q`, o.namespace)
	stream, err := events.NewEventsClient(connection).Subscribe(ctx, &events.SubscribeRequest{Filters: []string{filter}})
	if err != nil {
		return nil, err
	}
	s := &subscriber{}
	go func() {
		for {
			if _, err := stream.Recv(); err != nil {
				s.failed.Store(&err)
				return
			}
			s.received.Add(1)
		}
	}()
	return s, nil
}

// fanout prepares -operations snapshots while -subscribers listen, and measures from the first call until every
// subscriber has every event.
func fanout(ctx context.Context, o options, connections []*grpc.ClientConn) (report, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := newSession(ctx, o, connections)
	subscribers := make([]*subscriber, o.subscribers)
	for i := range subscribers {
		var err error
		if subscribers[i], err = subscribe(ctx, o, connections[i%len(connections)]); err != nil {
			return report{}, err
		}
	}
	before, err := listening(s, subscribers)
	if err != nil {
		return report{}, err
	}
	begin := time.Now()
	preparing := load{callers: o.callers, operations: o.operations}
	calls, err := preparing.run(func(caller, number int) error { return s.prepare(caller, s.key(number), s.parent) })
	if err != nil {
		return report{}, err
	}
	expected := int64(o.operations) * int64(o.subscribers)
	delivered, err := await(subscribers, before+expected)
	elapsed := time.Since(begin)
	if err != nil {
		return report{}, err
	}
	result := calls.report(o)
	result.Subscribers = o.subscribers
	result.Deliveries = delivered - before
	result.Lost = expected - result.Deliveries
	result.DeliveryRate = float64(result.Deliveries) / elapsed.Seconds()
	return result, nil
}

// listening prepares snapshots until every subscriber has heard of one, and then of all of them: a subscription
// has no answer that says when it has begun. It returns how many events were received until then.
func listening(s *session, subscribers []*subscriber) (int64, error) {
	probes := int64(0)
	for deadline := time.Now().Add(fanoutTimeout); !all(subscribers, 1); probes++ {
		if time.Now().After(deadline) {
			return 0, fmt.Errorf("not every subscriber hears anything after %s", fanoutTimeout)
		}
		if err := s.prepare(0, fmt.Sprintf("probe-%s-%d", s.prefix, probes), s.parent); err != nil {
			return 0, err
		}
		time.Sleep(10 * time.Millisecond)
	}
	// Events reach a subscription in their order, so once nothing more arrives the last probe has.
	count := total(subscribers)
	for {
		time.Sleep(100 * time.Millisecond)
		if latest := total(subscribers); latest == count {
			return count, nil
		} else {
			count = latest
		}
	}
}

// await waits until the subscribers have received expected events together, or no more come.
func await(subscribers []*subscriber, expected int64) (int64, error) {
	deadline := time.Now().Add(fanoutTimeout)
	for {
		count := total(subscribers)
		if count >= expected || time.Now().After(deadline) {
			return count, nil
		}
		for _, s := range subscribers {
			if err := s.failed.Load(); err != nil {
				return count, *err
			}
		}
		time.Sleep(fanoutPoll)
	}
}

func all(subscribers []*subscriber, least int64) bool {
	for _, s := range subscribers {
		if s.received.Load() < least {
			return false
		}
	}
	return true
}

func total(subscribers []*subscriber) int64 {
	count := int64(0)
	for _, s := range subscribers {
		count += s.received.Load()
	}
	return count
}

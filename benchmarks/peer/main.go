// Command peer loads containerd's snapshots service over gRPC and prints one JSON document: the other side of
// every comparison, as a compiled Go program, since that is what containerd's own callers are.
//
// All callers run in this one program. Each makes its next call when the one before is answered, so the number
// of callers is the number of calls under way.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
)

// messageBytesMax is containerd's own limit for a message, each way.
const messageBytesMax = 16 << 20

// options are what the command line says; the same names are used by the caller of our broker.
type options struct {
	address     string
	namespace   string
	snapshotter string
	operation   string
	parent      string
	prefix      string
	callers     int
	connections int
	subscribers int
	operations  int
	keys        int
	seconds     float64
	warmup      float64
	untilEOF    bool
}

// report is what is printed: rates in calls a second, latencies in milliseconds.
type report struct {
	Operation   string  `json:"operation"`
	Callers     int     `json:"callers"`
	Operations  int     `json:"operations"`
	Seconds     float64 `json:"seconds"`
	Rate        float64 `json:"rate"`
	P50         float64 `json:"p50_ms"`
	P99         float64 `json:"p99_ms"`
	Max         float64 `json:"max_ms"`
	Subscribers int     `json:"subscribers,omitempty"`
	Deliveries  int64   `json:"deliveries,omitempty"`
	Lost        int64   `json:"lost"`
	// DeliveryRate is deliveries to all subscribers together, a second.
	DeliveryRate float64 `json:"delivery_rate,omitempty"`
}

func main() {
	var o options
	flag.StringVar(&o.address, "address", "", "containerd's unix socket")
	flag.StringVar(&o.namespace, "namespace", "bench", "namespace of every call")
	flag.StringVar(&o.snapshotter, "snapshotter", "overlayfs", "snapshotter of every call")
	flag.StringVar(&o.operation, "operation", "stat",
		"prepare, cycle, stat, mounts, usage, walk, fill, drop, chain, settle or fanout")
	flag.StringVar(&o.parent, "parent", "", "parent of what is prepared")
	flag.StringVar(&o.prefix, "prefix", "key", "names are <prefix>-<number>")
	flag.IntVar(&o.callers, "callers", 1, "calls under way at a time")
	flag.IntVar(&o.connections, "connections", 1, "connections that the callers share")
	flag.IntVar(&o.subscribers, "subscribers", 1, "subscribers of a fanout")
	flag.IntVar(&o.operations, "operations", 0, "how many calls; without it, until -seconds have passed")
	flag.IntVar(&o.keys, "keys", 1, "how many names the reads go to")
	flag.Float64Var(&o.seconds, "seconds", 1, "how long new calls are begun")
	flag.Float64Var(&o.warmup, "warmup", 0, "seconds of calls that are not counted, before")
	flag.BoolVar(&o.untilEOF, "until-eof", false,
		"print the line \"ready\" when the load begins, and end it when standard input is at its end")
	flag.Parse()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	if o.callers < 1 || o.connections < 1 || o.keys < 1 {
		return fmt.Errorf("-callers, -connections and -keys are at least 1")
	}
	connections := make([]*grpc.ClientConn, o.connections)
	for i := range connections {
		connection, err := grpc.NewClient("unix://"+o.address,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(messageBytesMax)))
		if err != nil {
			return err
		}
		defer connection.Close()
		connections[i] = connection
	}
	ctx := metadata.AppendToOutgoingContext(context.Background(), "containerd-namespace", o.namespace)
	result, err := operate(ctx, o, connections)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

// operate runs the operation that the options name.
func operate(ctx context.Context, o options, connections []*grpc.ClientConn) (report, error) {
	switch o.operation {
	case "settle":
		return settle(ctx, o, connections[0])
	case "fanout":
		return fanout(ctx, o, connections)
	}
	w, err := newWork(ctx, o, connections)
	if err != nil {
		return report{}, err
	}
	if o.warmup > 0 {
		warmup := load{callers: o.callers, duration: seconds(o.warmup)}
		if _, err := warmup.run(w.warm); err != nil {
			return report{}, err
		}
	}
	measured := load{callers: o.callers, operations: o.operations, duration: seconds(o.seconds)}
	if o.untilEOF {
		measured.stop = endOfInput()
		fmt.Println("ready")
	}
	latencies, err := measured.run(w.call)
	if err != nil {
		return report{}, err
	}
	return latencies.report(o), nil
}

// endOfInput is closed when standard input is at its end.
func endOfInput() <-chan struct{} {
	end := make(chan struct{})
	go func() {
		defer close(end)
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	return end
}

func seconds(value float64) time.Duration {
	return time.Duration(value * float64(time.Second))
}

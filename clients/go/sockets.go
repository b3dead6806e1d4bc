package snapbroker

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	zmq "github.com/pebbe/zmq4"
)

// The ZeroMQ sockets: one place for their options.
//
// A DEALER with IMMEDIATE set holds no message for a broker that is not there: a send without a connection says so at
// once, and what was queued when a connection broke is dropped, not delivered to the next broker minutes later. The
// monitor tells when a connection broke: replies that were under way then will never come. ZeroMQ reports the break
// before it takes the connection's queue away: what is sent in between is accepted and lost. So after a break nothing is
// sent until the monitor has seen the next handshake.
//
// A libzmq socket may go from thread to thread as long as one uses it at a time and a mutex lies in between, so no
// goroutine is locked to a thread. Nothing ever blocks inside libzmq: the descriptor of a socket is waited for by the
// runtime's own poller, which suits it, for both are edge-triggered. A socket is read until nothing comes before its
// descriptor is waited for, and looked at again after every send, which may have eaten the edge.

const (
	reconnectFirst  = 50 * time.Millisecond  // first pause between attempts to connect
	reconnectMax    = time.Second            // longest such pause
	linger          = 100 * time.Millisecond // how long closing waits for last messages, such as a Cancel
	eventsQueuedMax = 100_000                // events a subscriber's socket holds; more are dropped and healed
	alive           = 10 * time.Second       // pause between pings over tcp, where a dead peer is not noticed else
	frameBytesMax   = BodyBytesMax + 4096
)

const (
	handshakeFailures = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL |
		zmq.EVENT_HANDSHAKE_FAILED_AUTH
	monitored = zmq.EVENT_HANDSHAKE_SUCCEEDED | handshakeFailures | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
	// mechanismMismatch is libzmq's ZMQ_PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH.
	mechanismMismatch = 0x11000002
)

var monitors atomic.Uint64

// watched is a socket with its descriptor in the runtime's poller.
type watched struct {
	*zmq.Socket
	transfer
	file     *os.File
	raw      syscall.RawConn
	endpoint string // of a subscriber's
}

// watch gives the poller a copy of the socket's descriptor: the socket closes its own.
func watch(socket *zmq.Socket) (*watched, error) {
	transfer, err := transferOf(socket)
	if err != nil {
		return nil, err
	}
	descriptor, err := socket.GetFd()
	if err != nil {
		return nil, err
	}
	syscall.ForkLock.RLock()
	own, err := syscall.Dup(descriptor)
	if err == nil {
		syscall.CloseOnExec(own)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, fmt.Errorf("dup: %w", err)
	}
	// Its flags, such as O_NONBLOCK, are those of the socket's: that is what makes the poller take it.
	file, raw, err := polled(own)
	if err != nil {
		return nil, err
	}
	return &watched{Socket: socket, transfer: transfer, file: file, raw: raw}, nil
}

// polled has the descriptor waited for by the runtime's poller, and closes it where that cannot be.
func polled(descriptor int) (*os.File, syscall.RawConn, error) {
	file := os.NewFile(uintptr(descriptor), "zmq")
	raw, err := file.SyscallConn()
	if err == nil {
		err = file.SetReadDeadline(time.Time{})
	}
	if err != nil {
		_ = file.Close()
		return nil, nil, fmt.Errorf("poll: %w", err)
	}
	return file, raw, nil
}

// watchByGate is watch for a socket that a lone caller waits for itself.
func watchByGate(socket *zmq.Socket) (*watched, *lookout, error) {
	transfer, err := transferOf(socket)
	if err != nil {
		return nil, nil, err
	}
	l, err := lookoutFor(socket)
	if err != nil {
		return nil, nil, err
	}
	return &watched{Socket: socket, transfer: transfer, file: l.gate, raw: l.raw}, l, nil
}

// readable says whether a message can be taken; it also makes the socket do what was put off.
func (w *watched) readable() bool {
	state, err := w.GetEvents()
	return err == nil && state&zmq.POLLIN != 0
}

// connectAnew has a connection made at once, and one that libzmq has given up tried again.
func (w *watched) connectAnew(endpoint string) {
	// Where there is none to take away the next line is all there is to do; an endpoint that was good stays so.
	_ = w.Disconnect(endpoint)
	_ = w.Connect(endpoint)
}

// opened says whether the socket was not closed yet.
func (w *watched) opened() bool {
	_, err := w.Context()
	return err == nil
}

// close closes the socket; who waits for its descriptor learns of it, and is waited for: so this is called without the
// lock that it may want, and only where nobody uses the socket any more.
func (w *watched) close() {
	w.interrupt()
	_ = w.Close()
}

func (w *watched) interrupt() { _ = w.file.Close() }

// dealer connects to the broker's router; monitor tells of its connection.
func dealer(
	context *zmq.Context, endpoint string, keys *curveKeys,
) (socket, monitor *watched, lookout *lookout, err error) {
	bare, err := context.NewSocket(zmq.DEALER)
	if err != nil {
		return nil, nil, nil, exhausted(endpoint, err)
	}
	watcher, err := context.NewSocket(zmq.PAIR)
	if err != nil {
		_ = bare.Close()
		return nil, nil, nil, exhausted(endpoint, err)
	}
	address := fmt.Sprintf("inproc://monitor-%d", monitors.Add(1))
	err = errors.Join(
		bare.SetImmediate(true),
		// A ROUTER drops what does not fit a peer's queue. The queue is bounded by what this client asked for.
		bare.SetRcvhwm(0),
		setCommon(bare, endpoint, keys),
		bare.Monitor(address, monitored),
		// The I/O thread would block on a full queue of a monitor that nobody reads.
		watcher.SetRcvhwm(0),
		watcher.SetLinger(0),
		watcher.Connect(address),
	)
	if err == nil {
		if socket, lookout, err = watchByGate(bare); err == nil {
			if monitor, err = watch(watcher); err != nil {
				_ = socket.file.Close()
				lookout.close()
			}
		}
	}
	if err != nil {
		_ = watcher.Close()
		_ = bare.Close()
		return nil, nil, nil, exhausted(endpoint, err)
	}
	if err = bare.Connect(endpoint); err != nil {
		_ = bare.Monitor("", 0)
		monitor.close()
		socket.close()
		lookout.close()
		return nil, nil, nil, noEndpoint(endpoint, err)
	}
	return socket, monitor, lookout, nil
}

// publications connects to the broker's publisher, subscribed to the prefixes.
func publications(
	context *zmq.Context, endpoint string, keys *curveKeys, prefixes []string, queued int,
) (*watched, error) {
	bare, err := context.NewSocket(zmq.SUB)
	if err != nil {
		return nil, exhausted(endpoint, err)
	}
	err = errors.Join(bare.SetRcvhwm(queued), setCommon(bare, endpoint, keys))
	for _, prefix := range prefixes {
		err = errors.Join(err, bare.SetSubscribe(prefix))
	}
	var socket *watched
	if err == nil {
		socket, err = watch(bare)
	}
	if err != nil {
		_ = bare.Close()
		return nil, exhausted(endpoint, err)
	}
	if err := bare.Connect(endpoint); err != nil {
		socket.close()
		return nil, noEndpoint(endpoint, err)
	}
	return socket, nil
}

func setCommon(socket *zmq.Socket, endpoint string, keys *curveKeys) error {
	err := errors.Join(
		socket.SetLinger(linger),
		socket.SetReconnectIvl(reconnectFirst),
		socket.SetReconnectIvlMax(reconnectMax),
		socket.SetMaxmsgsize(frameBytesMax),
	)
	if strings.HasPrefix(endpoint, tcp) {
		err = errors.Join(err, socket.SetIpv6(true), socket.SetHeartbeatIvl(alive), socket.SetHeartbeatTimeout(3*alive))
	}
	if keys != nil {
		err = errors.Join(err, keys.apply(socket))
	}
	return err
}

func exhausted(endpoint string, err error) *Error {
	return fault(CodeResourceExhausted, "no further socket to %s: %v", endpoint, err)
}

func noEndpoint(endpoint string, err error) *Error {
	return invalid("%q is no endpoint to connect to: %v", endpoint, err)
}

// absentBroker is the message for a broker that cannot be reached.
func absentBroker(endpoint string, waited time.Duration) string {
	return fmt.Sprintf("no broker answers at %s (waited %.3g s): start snapbrokerd, or name the right endpoint by "+
		"WithEndpoint or %s", endpoint, waited.Seconds(), EndpointVariable)
}

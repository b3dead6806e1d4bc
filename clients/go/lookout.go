package snapbroker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"
	"unsafe"

	zmq "github.com/pebbe/zmq4"
)

// A caller that is alone waits for the socket's descriptor itself, in poll(2). The way by Go's poller and the goroutine
// that reads costs a lone call a fifth of its time: a thread wakes from the poller, wakes another to look for work in its
// place, and hands over by a channel.
//
// Waiting is all that it does without the locks, and a descriptor may be waited for by anybody: what has come is taken
// under io as everywhere. Meanwhile the goroutine that reads is left asleep: the runtime's poller holds an epoll of its
// own, in which the socket's descriptor is switched off. Who settles the call, or ends its context, rings a bell.

// lookout waits for the descriptor of a socket, for one caller at a time.
type lookout struct {
	descriptor int // the socket's
	gate       *os.File
	raw        syscall.RawConn // the gate's
	bell       int             // an eventfd
	rung       bool            // with mu
	user       *pending        // with mu
	users      sync.WaitGroup
}

// lookoutFor watches the socket by a gate: what the runtime's poller waits for is the answer's file.
func lookoutFor(socket *zmq.Socket) (*lookout, error) {
	descriptor, err := socket.GetFd()
	if err != nil {
		return nil, err
	}
	epoll, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("epoll_create: %w", err)
	}
	bell, _, errno := syscall.Syscall(syscall.SYS_EVENTFD2, 0, syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if errno != 0 {
		_ = syscall.Close(epoll)
		return nil, fmt.Errorf("eventfd: %w", errno)
	}
	l := &lookout{descriptor: descriptor, bell: int(bell)}
	event := syscall.EpollEvent{Events: syscall.EPOLLIN, Fd: int32(descriptor)}
	err = errors.Join(
		syscall.EpollCtl(epoll, syscall.EPOLL_CTL_ADD, descriptor, &event),
		syscall.SetNonblock(epoll, true),
	)
	if err == nil {
		l.gate, l.raw, err = polled(epoll)
	} else {
		_ = syscall.Close(epoll)
	}
	if err != nil {
		_ = syscall.Close(l.bell)
		return nil, err
	}
	return l, nil
}

// open says whether the goroutine that reads learns of what comes. Of what came before it may not learn: an epoll does not
// tell anew of a descriptor that it has in its list of the ready ones, and there it stays, read or not, until the epoll
// is asked.
func (l *lookout) open(open bool) {
	event := syscall.EpollEvent{Fd: int32(l.descriptor)}
	if open {
		event.Events = syscall.EPOLLIN
	}
	// An error is that of the closed gate.
	_ = l.raw.Control(func(gate uintptr) {
		_ = syscall.EpollCtl(int(gate), syscall.EPOLL_CTL_MOD, l.descriptor, &event)
	})
}

// wait until something may have come, or the bell was rung.
func (l *lookout) wait() {
	type pollfd struct {
		descriptor int32
		events     int16
		revents    int16
	}
	const pollin = 1
	descriptors := [2]pollfd{{int32(l.descriptor), pollin, 0}, {int32(l.bell), pollin, 0}}
	// Whatever ends it: who waits looks what there is.
	_, _, _ = syscall.Syscall6(syscall.SYS_PPOLL, uintptr(unsafe.Pointer(&descriptors[0])), 2, 0, 0, 0, 0)
}

// ring wakes the user. With mu.
func (l *lookout) ring() {
	if !l.rung {
		l.rung = true
		one := [8]byte{1}
		_, _ = syscall.Write(l.bell, one[:])
	}
}

// hush makes the bell one that was not rung. With mu.
func (l *lookout) hush() {
	if l.rung {
		l.rung = false
		var count [8]byte
		_, _ = syscall.Read(l.bell, count[:])
	}
}

// close is for a lookout that nobody uses any more.
func (l *lookout) close() { _ = syscall.Close(l.bell) }

// lookOut waits for the call's outcome at the socket itself, where the caller is alone; it may come back without one.
func (c *connection) lookOut(ctx context.Context, p *pending) {
	l := c.lookout
	c.mu.Lock()
	if c.closed || l.user != nil || p.settled || !p.exchange.sent || c.waiting.Load() > 1 {
		c.mu.Unlock()
		return
	}
	l.user, p.bell = p, l
	l.users.Add(1)
	c.mu.Unlock()
	defer l.users.Done()
	l.open(false)
	defer c.lookAway()
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, func() {
			c.mu.Lock()
			if l.user == p {
				l.ring()
			}
			c.mu.Unlock()
		})
		defer stop()
	}
	for {
		l.wait()
		c.mu.Lock()
		l.hush()
		p.bell = nil // What this goroutine settles itself needs no bell.
		over := p.settled || ctx.Err() != nil
		c.mu.Unlock()
		if !over {
			c.io.Lock()
			if c.socket != nil {
				c.drain()
				c.sendUnsent()
			}
			c.io.Unlock()
			c.post()
		}
		c.mu.Lock()
		if over || p.settled {
			l.user = nil
			l.hush()
			c.mu.Unlock()
			return
		}
		p.bell = l
		c.mu.Unlock()
	}
}

// lookAway leaves the socket to the goroutine that reads, and takes what has come before it was told to.
func (c *connection) lookAway() {
	c.lookout.open(true)
	c.io.Lock()
	c.lookAgain()
	c.io.Unlock()
	c.post()
}

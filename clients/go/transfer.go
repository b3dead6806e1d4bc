package snapbroker

/*
#cgo pkg-config: libzmq
#include <errno.h>
#include <string.h>
#include <zmq.h>

enum { FRAMES_MAX = 4 };

// What was received and has not been copied yet.
typedef struct {
	zmq_msg_t frames[FRAMES_MAX];
	size_t sizes[FRAMES_MAX];
	size_t total;
	int count;
} snb_message;

static int snb_receive_frame(zmq_msg_t *frame, void *socket) {
	int size;
	zmq_msg_init(frame);
	do
		size = zmq_msg_recv(frame, socket, ZMQ_DONTWAIT);
	while (size < 0 && zmq_errno() == EINTR);
	return size;
}

static void snb_copy(snb_message *message, char *to) {
	for (int i = 0; i < message->count; i++) {
		memcpy(to, zmq_msg_data(&message->frames[i]), message->sizes[i]);
		to += message->sizes[i];
		zmq_msg_close(&message->frames[i]);
	}
}

// Takes a message whole, and copies it where it has room. Answers whether one was there; its count is -1 where it has
// more frames than any message of ours.
static int snb_receive(void *socket, snb_message *message, char *to, size_t room) {
	message->count = 0;
	message->total = 0;
	for (int more = 1; more; message->count++) {
		zmq_msg_t spare;
		zmq_msg_t *frame = message->count < FRAMES_MAX ? &message->frames[message->count] : &spare;
		int size = snb_receive_frame(frame, socket);
		if (size < 0) {
			// The parts of a message are there together, or not at all.
			zmq_msg_close(frame);
			return 0;
		}
		more = zmq_msg_more(frame);
		if (frame == &spare)
			zmq_msg_close(frame);
		else
			message->sizes[message->count] = size;
		message->total += size;
	}
	if (message->count > FRAMES_MAX) {
		for (int i = 0; i < FRAMES_MAX; i++)
			zmq_msg_close(&message->frames[i]);
		message->count = -1;
	} else if (message->total <= room)
		snb_copy(message, to);
	return 1;
}

static int snb_send_frame(void *socket, const void *frame, size_t size, int more) {
	int sent;
	do
		sent = zmq_send(socket, frame, size, ZMQ_DONTWAIT | (more ? ZMQ_SNDMORE : 0));
	while (sent < 0 && zmq_errno() == EINTR);
	return sent >= 0;
}

// Only the first frame of a message may be refused.
static int snb_send(void *socket, const void *a, size_t na, const void *b, size_t nb, const void *c, size_t nc,
		const void *d, size_t nd) {
	return snb_send_frame(socket, a, na, 1) && snb_send_frame(socket, b, nb, 1) && snb_send_frame(socket, c, nc, 1) &&
		snb_send_frame(socket, d, nd, 0);
}
*/
import "C"

import (
	"errors"
	"reflect"
	"unsafe"

	zmq "github.com/pebbe/zmq4"
)

// Whole messages in and out of libzmq, each with one call into C. zmq4 makes six for each frame, which is most of what
// an event costs: measured, 24 of 26 calls for each, and twice the events a second without them.

// chunkBytes are received into before the next are allocated; messages that are kept keep their chunk.
const chunkBytes = 64 << 10

// transfer moves messages of one socket, for one user at a time.
type transfer struct {
	socket  unsafe.Pointer
	message *C.snb_message
	chunk   []byte
}

// transferOf finds libzmq's own socket in that of zmq4, which does not export it.
func transferOf(socket *zmq.Socket) (transfer, error) {
	field := reflect.ValueOf(socket).Elem().FieldByName("soc")
	if field.Kind() != reflect.UnsafePointer || field.UnsafePointer() == nil {
		return transfer{}, errors.New("this version of zmq4 keeps its socket elsewhere")
	}
	return transfer{socket: field.UnsafePointer(), message: new(C.snb_message)}, nil
}

// receive takes a message if one is there; one of a wrong number of frames has none.
func (t *transfer) receive() (frames [][]byte, ok bool) {
	if len(t.chunk) == 0 {
		t.chunk = make([]byte, chunkBytes)
	}
	m := t.message
	if C.snb_receive(t.socket, m, (*C.char)(unsafe.Pointer(&t.chunk[0])), C.size_t(len(t.chunk))) == 0 {
		return nil, false
	}
	if m.count < 0 {
		return [][]byte{}, true
	}
	data := t.chunk
	if total := int(m.total); total > len(data) {
		data = make([]byte, max(total, chunkBytes))
		C.snb_copy(m, (*C.char)(unsafe.Pointer(&data[0])))
		t.chunk = data
	}
	frames = make([][]byte, m.count)
	for i := range frames {
		size := int(m.sizes[i])
		frames[i], data = data[:size:size], data[size:]
	}
	t.chunk = data
	return frames, true
}

// send sends a message of four frames whole, or says that it cannot be sent at the moment.
func (t *transfer) send(frames [4][]byte) bool {
	at := func(i int) (unsafe.Pointer, C.size_t) {
		return unsafe.Pointer(unsafe.SliceData(frames[i])), C.size_t(len(frames[i]))
	}
	a, na := at(0)
	b, nb := at(1)
	c, nc := at(2)
	d, nd := at(3)
	return C.snb_send(t.socket, a, na, b, nb, c, nc, d, nd) != 0
}

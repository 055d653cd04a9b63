package main

import (
	"errors"
	"io"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"
)

// The bounds of request bodies, in bytes.
const (
	smallBody = 4 << 10
	textBody  = 16 << 10 // with a text that a person wrote
	maxBody   = 1 << 20  // an order
)

const (
	// largeBody is the size from which on a body takes one of the places for large ones. An order of 50 paintings is smaller.
	largeBody = 64 << 10
	// maxLargeBodies is how many large bodies are in memory at once, so that those which never end do not fill it.
	maxLargeBodies = 8
)

// placedBody is a request's body, of which only a few at once may be large.
type placedBody struct {
	io.Reader
	places chan struct{}
	size   int  // read so far
	placed bool // it has taken one of places
}

// Read returns a 503 when the body becomes a large one and no place is free.
func (b *placedBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	b.size += n
	if b.size <= largeBody || b.placed {
		return n, err
	}
	select {
	case b.places <- struct{}{}:
		b.placed = true
		return n, err
	default:
		return n, &httpError{status: http.StatusServiceUnavailable, body: message{messageAway}, retryAfter: 30 * time.Second}
	}
}

// release gives the body's place back once the request is answered.
func (b *placedBody) release() {
	if b.placed {
		<-b.places
	}
}

// readBody returns the request's body. The error is a 413 when it is larger than the route allows, a 503 when too many large
// bodies are under way, and a 400 when it cannot be read or is not UTF-8.
func readBody(r *request) ([]byte, error) {
	body, err := io.ReadAll(r.body)
	tooLarge, isTooLarge := errors.AsType[*http.MaxBytesError](err)
	refused, isRefused := errors.AsType[*httpError](err)
	switch {
	case isTooLarge:
		return nil, statusError(http.StatusRequestEntityTooLarge, "요청 본문은 "+bodySize(tooLarge.Limit)+"를 넘을 수 없습니다")
	case isRefused:
		return nil, refused
	case err != nil:
		return nil, statusError(http.StatusBadRequest, "요청 본문을 끝까지 읽지 못했습니다")
	case !utf8.Valid(body):
		return nil, statusError(http.StatusBadRequest, "요청 본문이 올바른 UTF-8이 아닙니다")
	}
	return body, nil
}

// bodySize returns one of the bounds of bodies as people write it.
func bodySize(bytes int64) string {
	if bytes >= 1<<20 {
		return strconv.FormatInt(bytes>>20, 10) + "MB"
	}
	return strconv.FormatInt(bytes>>10, 10) + "KB"
}

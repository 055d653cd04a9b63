package main

import (
	"io"
	"net/http"
	"strings"
	"testing"
)

// Bodies that never end take little memory: few of them become large, and the next one is refused until one of those is given up.
func TestUnfinishedBodies(t *testing.T) {
	s := newShop(t)
	good := marshalRaw(orderBody(newNumber(), s.painting(99000)))
	large := good + strings.Repeat(" ", largeBody)
	var ends []*io.PipeWriter
	answered := make(chan int)
	for range maxLargeBodies {
		body, end := io.Pipe()
		request, err := newCall(t.Context(), "POST", s.url+"/api/orders", s.as(buyerA), nil)
		check(t, err)
		request.Body, request.ContentLength = body, maxBody
		go func() {
			response, err := http.DefaultClient.Do(request)
			if err == nil {
				response.Body.Close()
			}
			answered <- 0
		}()
		_, err = io.WriteString(end, large)
		check(t, err)
		ends = append(ends, end)
	}
	waitUntil(t, "all places are taken", func() bool { return len(s.largeBodies) == maxLargeBodies })
	s.want(s.call(buyerB, "POST", "/api/orders", large), 503, messageAway)
	s.want(s.call(buyerB, "POST", "/api/orders", good), 201, "")
	for _, end := range ends {
		end.CloseWithError(io.ErrUnexpectedEOF)
		<-answered
	}
	waitUntil(t, "all places are free", func() bool { return len(s.largeBodies) == 0 })
	s.want(s.call(buyerB, "POST", "/api/orders", large), 201, "")
}

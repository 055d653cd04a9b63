package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// browser is a headless Chromium with one page, driven as a person would drive it: by looking, clicking and typing. It
// is spoken to over two pipes in the DevTools protocol (chromedevtools.github.io/devtools-protocol), JSON messages with
// a NUL after each. Nothing runs beside the test: events are read on the way to a command's answer.
type browser struct {
	t        testing.TB
	commands *os.File
	answers  *os.File
	messages *bufio.Reader     // from answers
	session  string            // the page's
	last     int               // the id of the newest command
	methods  map[string]string // of the page's requests, by their id
	refused  []string          // answers of 400 and above: "PATCH /api/orders/pay 400"
	problems []string          // whatever a page must not do
	origin   string            // the only one that it may talk to
	log      string            // the file with what Chromium says
}

// openBrowser starts a Chromium that knows nothing of this machine's user, with a page that is empty yet and may talk to
// origin alone.
func openBrowser(t testing.TB, origin string) *browser {
	t.Helper()
	program := findTool(t, "chromium", "chromium-browser", "google-chrome", "google-chrome-stable",
		"/Applications/Chromium.app/Contents/MacOS/Chromium", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
	home, err := os.MkdirTemp("", "chromium") // not T.TempDir: what Chromium leaves behind for a moment is no failure
	check(t, err)
	log, err := os.Create(filepath.Join(home, "log"))
	check(t, err)
	theirCommands, commands, err := os.Pipe()
	check(t, err)
	answers, theirAnswers, err := os.Pipe()
	check(t, err)
	cmd := exec.Command(program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic",
		"--disable-sync", "--disable-background-networking", "--disable-component-update", "--no-first-run", "--no-startup-window",
		"--lang=ko", "--user-data-dir="+home, "--remote-debugging-pipe")
	cmd.ExtraFiles = []*os.File{theirCommands, theirAnswers} // 3 and 4
	cmd.Env = append(os.Environ(), "HOME="+home)
	cmd.Stderr = log
	check(t, cmd.Start())
	for _, theirs := range []*os.File{theirCommands, theirAnswers, log} {
		theirs.Close()
	}
	t.Cleanup(func() {
		commands.Close() // it ends when its pipe does
		answers.Close()
		late := time.AfterFunc(10*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		late.Stop()
		os.RemoveAll(home)
	})
	b := &browser{t: t, commands: commands, answers: answers, messages: bufio.NewReader(answers), methods: map[string]string{},
		origin: origin, log: log.Name()}
	var target struct{ TargetID string }
	var attached struct{ SessionID string }
	check(t, json.Unmarshal(b.do("Target.createTarget", object{"url": "about:blank"}), &target))
	check(t, json.Unmarshal(b.do("Target.attachToTarget", object{"targetId": target.TargetID, "flatten": true}), &attached))
	b.session = attached.SessionID
	for _, domain := range []string{"Page", "Runtime", "Log", "Network"} {
		b.do(domain+".enable", object{})
	}
	b.do("Emulation.setFocusEmulationEnabled", object{"enabled": true})
	return b
}

type object = map[string]any

// do has the browser carry out a command and answers its result.
func (b *browser) do(method string, params object) json.RawMessage {
	b.t.Helper()
	b.last++
	command, err := json.Marshal(object{"id": b.last, "method": method, "params": params, "sessionId": b.session})
	check(b.t, err)
	_, err = b.commands.Write(append(command, 0))
	check(b.t, err)
	check(b.t, b.answers.SetReadDeadline(time.Now().Add(2*time.Minute)))
	for {
		text, err := b.messages.ReadBytes(0)
		if err != nil {
			log, _ := os.ReadFile(b.log)
			b.t.Fatalf("%s %v: %v; Chromium said:\n%s", method, params, err, log)
		}
		var message struct {
			ID             int
			Method         string
			Params, Result json.RawMessage
			Error          *struct{ Message string }
		}
		check(b.t, json.Unmarshal(text[:len(text)-1], &message))
		switch {
		case message.ID == 0:
			b.watch(message.Method, message.Params)
		case message.ID == b.last && message.Error != nil:
			b.t.Fatalf("%s %v: %s", method, params, message.Error.Message)
		case message.ID == b.last:
			return message.Result
		}
	}
}

// watch notes what a page must not do, and which of its requests were refused.
func (b *browser) watch(method string, params json.RawMessage) {
	var event struct {
		RequestID, Type string
		Request         struct{ URL, Method string }
		Response        struct {
			URL    string
			Status int
		}
		Entry struct{ Source, Level string }
	}
	check(b.t, json.Unmarshal(params, &event))
	switch {
	case method == "Network.requestWillBeSent":
		b.methods[event.RequestID] = event.Request.Method
		if !strings.HasPrefix(event.Request.URL, b.origin+"/") && !strings.HasPrefix(event.Request.URL, "data:") {
			b.problems = append(b.problems, "a request to "+event.Request.URL)
		}
	case method == "Network.responseReceived" && event.Response.Status >= 400:
		path, _, _ := strings.Cut(strings.TrimPrefix(event.Response.URL, b.origin), "?")
		b.refused = append(b.refused, fmt.Sprint(b.methods[event.RequestID], " ", path, " ", event.Response.Status))
	case method == "Log.entryAdded" && event.Entry.Source == "network": // the same refusals again
	case method == "Log.entryAdded", method == "Runtime.exceptionThrown", method == "Network.loadingFailed",
		method == "Runtime.consoleAPICalled" && (event.Type == "error" || event.Type == "warning" || event.Type == "assert"):
		b.problems = append(b.problems, method+" "+string(params))
	}
}

// run evaluates an expression in the page, and waits for it when it is a promise; into is where its value goes, nil: nowhere.
func (b *browser) run(expression string, into any) {
	b.t.Helper()
	var answer struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails *struct {
			Exception struct{ Description, Value string }
		}
	}
	text := b.do("Runtime.evaluate", object{"expression": expression, "awaitPromise": true, "returnByValue": true})
	check(b.t, json.Unmarshal(text, &answer))
	if e := answer.ExceptionDetails; e != nil {
		b.t.Fatal(cmp.Or(e.Exception.Description, e.Exception.Value))
	}
	if into != nil {
		check(b.t, json.Unmarshal(answer.Result.Value, into))
	}
}

// until waits for an expression to be truthy in a page that waits for nothing, and answers its value.
func (b *browser) until(expression string, into any) {
	b.t.Helper()
	b.run(fmt.Sprintf(`new Promise((resolve, reject) => {
		const end = performance.now() + 60000;
		(function look() {
			const found = document.querySelector('h1') && !document.querySelector('[aria-busy=true]') && (%s);
			if (found) resolve(found);
			else if (performance.now() > end) reject('not seen: ' + %q + '\n' +
				[...document.querySelectorAll('main, #notice, dialog')].map(e => e.innerText).join('\n'));
			else setTimeout(look, 20);
		})();
	})`, expression, expression), into)
}

// look is what the expressions below find things with.
const look = `
	const visible = e => e.checkVisibility({visibilityProperty: true, opacityProperty: true});
	const shown = selector => [...document.querySelectorAll(selector)].filter(visible);
	const name = e => ((e.labels?.[0] ?? e).innerText ?? '').replace(/\s+/g, ' ').trim();`

// see waits until an element that selector names shows the text.
func (b *browser) see(selector, text string) {
	b.t.Helper()
	b.until(fmt.Sprintf(`(() => {%s
		return shown(%q).some(e => e.innerText.includes(%q));
	})()`, look, selector, text), nil)
}

// click waits until a thing whose name matches the pattern can be hit, and clicks it.
func (b *browser) click(pattern string) {
	b.t.Helper()
	var at struct{ X, Y float64 }
	b.until(fmt.Sprintf(`(() => {%s
		for (const e of shown('a, button, label, summary').filter(e => new RegExp(%q).test(name(e)))) {
			e.scrollIntoView({block: 'center'});
			const box = e.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
			if (e.contains(document.elementFromPoint(x, y))) return {x, y};
		}
	})()`, look, pattern), &at)
	for _, kind := range []string{"mouseMoved", "mousePressed", "mouseReleased"} {
		b.do("Input.dispatchMouseEvent", object{"type": kind, "x": at.X, "y": at.Y, "button": "left", "clickCount": 1})
	}
}

// press presses a key.
func (b *browser) press(key string) {
	b.t.Helper()
	code := map[string]int{"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39}[key]
	text := map[string]string{"Enter": "\r", " ": " "}[key]
	b.do("Input.dispatchKeyEvent", object{"type": "keyDown", "key": key, "windowsVirtualKeyCode": code, "text": text})
	b.do("Input.dispatchKeyEvent", object{"type": "keyUp", "key": key, "windowsVirtualKeyCode": code})
}

// tabTo presses Tab until the thing whose name matches the pattern has the focus. On the way the focus must be seen.
func (b *browser) tabTo(pattern string) {
	b.t.Helper()
	b.until("true", nil)
	for range 200 {
		b.press("Tab")
		var focus struct {
			Name         string
			Found, Shown bool
		}
		b.run(fmt.Sprintf(`(() => {%s
			const e = document.activeElement, ring = e.type === 'radio' ? e.nextElementSibling : e, box = ring.getBoundingClientRect();
			const outlined = getComputedStyle(ring).outlineStyle === 'solid' && box.bottom > 0 && box.top < innerHeight;
			return {name: name(e).slice(0, 60), found: new RegExp(%q).test(name(e)), shown: e === document.body || outlined};
		})()`, look, pattern), &focus)
		if !focus.Shown {
			b.t.Errorf("nobody sees that %q has the focus", focus.Name)
		}
		if focus.Found {
			return
		}
	}
	b.t.Fatalf("no way to %q with the Tab key", pattern)
}

// Sizes of a window.
var (
	phone = object{"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": true}
	wide  = object{"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": false}
)

// fits makes the window this large, and looks whether what it shows fits in.
func (b *browser) fits(size object) {
	b.t.Helper()
	b.do("Emulation.setDeviceMetricsOverride", size)
	b.run(`new Promise(requestAnimationFrame)`, nil) // by then the page knows
	var shown struct {
		Title, Text string
		Width       int
	}
	b.until(`({title: document.title, text: document.body.innerText, width: document.documentElement.scrollWidth})`, &shown)
	if odd := regexp.MustCompile(`\[object|undefined|NaN|Invalid`).FindString(shown.Text); odd != "" {
		b.t.Errorf("%s says %q", shown.Title, odd)
	}
	if shown.Width > size["width"].(int) {
		b.t.Errorf("%s is %d wide on a screen of %d", shown.Title, shown.Width, size["width"])
	}
}

// resize makes the window this large, the phone's or the wide one's; what it shows must fit both.
func (b *browser) resize(to object) {
	b.t.Helper()
	other := phone
	if to["width"] == phone["width"] {
		other = wide
	}
	b.fits(other)
	b.fits(to)
}

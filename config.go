package main

import (
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// config is the configuration of the service, read from the environment and checked.
type config struct {
	databaseURL               string
	jwtSecret                 []byte
	iamportKey, iamportSecret string
	iamportURL                string
	sandbox                   bool // accept payments of Iamport's test channels
	port                      int
	metricsAddress            string         // host:port of /metrics; metrics are not served when empty
	origins                   []string       // web origins that CORS allows
	proxies                   []netip.Prefix // reverse proxies whose X-Forwarded-For is trusted
	shipping                  int64          // shipping price of an order, in KRW
	hold                      time.Duration  // how long an unpaid order keeps its paintings
	reconcile                 time.Duration  // time between two rounds of the reconciler
	logLevel                  slog.Level
	local                     bool // local development
}

// secretNames lists the variables that have no default. When none of them is set, the service runs in local development.
var secretNames = []string{"DATABASE_URL", "JWT_SECRET", "IAMPORT_KEY", "IAMPORT_SECRET"}

// requiredNames lists the variables that a command requires outside local development, by command. The command that
// serves is "".
var requiredNames = map[string][]string{
	"":       secretNames,
	"import": {"DATABASE_URL"},
	"token":  {"JWT_SECRET"},
	"audit":  {"DATABASE_URL", "IAMPORT_KEY", "IAMPORT_SECRET"},
}

// readConfig returns the configuration for command. The error lists every problem at once, and never contains the value
// of a secret.
func readConfig(getenv func(string) string, command string) (config, error) {
	env := &environment{getenv: getenv}
	local := env.hasNoSecret()
	if !local {
		env.checkSecrets(command)
	}
	c := config{
		databaseURL:    env.text("DATABASE_URL", ""),
		jwtSecret:      []byte(getenv("JWT_SECRET")),
		iamportKey:     env.text("IAMPORT_KEY", ""),
		iamportSecret:  env.text("IAMPORT_SECRET", ""),
		iamportURL:     env.iamportURL(),
		sandbox:        env.sandbox(),
		port:           env.port(),
		shipping:       env.shipping(),
		metricsAddress: env.metricsAddress(),
		hold:           env.duration("ORDER_HOLD", "30m"),
		reconcile:      env.duration("RECONCILE_INTERVAL", "10s"),
		origins:        env.origins(),
		proxies:        env.proxies(),
		logLevel:       env.logLevel(),
		local:          local,
	}
	return c, errors.Join(env.problems...)
}

// environment reads variables and collects what is wrong with them.
type environment struct {
	getenv   func(string) string
	problems []error
}

func (e *environment) problem(format string, args ...any) {
	e.problems = append(e.problems, fmt.Errorf(format, args...))
}

// text returns the variable without surrounding space, or fallback when nothing is left.
func (e *environment) text(name, fallback string) string {
	if value := strings.TrimSpace(e.getenv(name)); value != "" {
		return value
	}
	return fallback
}

// list yields the elements of a comma-separated variable, without surrounding space and without empty ones.
func (e *environment) list(name string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for element := range strings.SplitSeq(e.getenv(name), ",") {
			if element = strings.TrimSpace(element); element != "" && !yield(element) {
				return
			}
		}
	}
}

// hasNoSecret reports whether every variable of secretNames is unset.
func (e *environment) hasNoSecret() bool {
	return !slices.ContainsFunc(secretNames, func(name string) bool { return e.getenv(name) != "" })
}

// checkSecrets checks that what command requires is set, and that the JWT secret is as long as RFC 7518 section 3.2
// demands for HS256.
func (e *environment) checkSecrets(command string) {
	for _, name := range requiredNames[command] {
		if e.getenv(name) == "" {
			e.problem("%s is not set (with none of %s set, the service runs in local development)", name, strings.Join(secretNames, ", "))
		}
	}
	if n := len(e.getenv("JWT_SECRET")); n > 0 && n < 32 {
		e.problem("JWT_SECRET has %d bytes; at least 32 are needed", n)
	}
}

func (e *environment) iamportURL() string {
	url := strings.TrimSuffix(e.text("IAMPORT_URL", "https://api.iamport.kr"), "/")
	if !strings.HasPrefix(url, "https://") && !strings.HasPrefix(url, "http://") {
		e.problem("IAMPORT_URL must begin with https:// or http://")
	}
	return url
}

func (e *environment) sandbox() bool {
	sandbox, err := strconv.ParseBool(e.text("IAMPORT_SANDBOX", "false"))
	if err != nil {
		e.problem("IAMPORT_SANDBOX must be true or false")
	}
	return sandbox
}

func (e *environment) port() int {
	port, err := strconv.Atoi(e.text("PORT", "5000"))
	if err != nil || port < 0 || port > 65535 {
		e.problem("PORT must be a number up to 65535")
	}
	return port
}

func (e *environment) shipping() int64 {
	price, err := strconv.ParseInt(e.text("SHIPPING_PRICE", "10000"), 10, 64)
	if err != nil || price < 0 || price > maxPrice {
		e.problem("SHIPPING_PRICE must be whole won, 0 or more")
	}
	return price
}

func (e *environment) metricsAddress() string {
	address := e.text("METRICS_ADDR", "")
	if address == "" {
		return ""
	}
	if _, _, err := net.SplitHostPort(address); err != nil {
		e.problem("METRICS_ADDR must be host:port, such as 127.0.0.1:9100")
	}
	return address
}

// duration returns a variable that must be a positive duration.
func (e *environment) duration(name, fallback string) time.Duration {
	d, err := time.ParseDuration(e.text(name, fallback))
	if err != nil || d <= 0 {
		e.problem("%s must be a duration such as %s", name, fallback)
	}
	return d
}

func (e *environment) origins() (origins []string) {
	for element := range e.list("CORS_ORIGINS") {
		origin := strings.TrimSuffix(element, "/")
		if !strings.Contains(origin, "://") || strings.Contains(origin, "*") {
			e.problem("CORS_ORIGINS lists exact origins such as https://lumiere.example, not %q", origin)
		}
		origins = append(origins, origin)
	}
	return origins
}

func (e *environment) proxies() (proxies []netip.Prefix) {
	for element := range e.list("TRUSTED_PROXIES") {
		proxy, err := parseProxy(element)
		if err != nil {
			e.problem("TRUSTED_PROXIES lists addresses and networks such as 10.0.0.0/8, not %q", element)
		}
		proxies = append(proxies, proxy)
	}
	return proxies
}

func (e *environment) logLevel() (level slog.Level) {
	if err := level.UnmarshalText([]byte(e.text("LOG_LEVEL", "info"))); err != nil {
		e.problem("LOG_LEVEL must be debug, info, warn or error")
	}
	return level
}

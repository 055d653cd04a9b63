package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// config is the environment, read and checked.
type config struct {
	databaseURL               string
	jwtSecret                 []byte
	iamportKey, iamportSecret string
	iamportURL                string
	sandbox                   bool // accept payments of test channels
	port                      int
	metricsAddress            string         // host:port of the figures; empty: nowhere
	origins                   []string       // allowed by CORS
	proxies                   []netip.Prefix // whose X-Forwarded-For is believed
	shipping                  int64          // won for an order
	hold                      time.Duration  // how long an unpaid order keeps its paintings
	reconcile                 time.Duration  // between rounds of the reconciler
	logLevel                  slog.Level
	local                     bool // local development
}

// secretNames are the variables without which the service is in local development; each command needs some of them.
var secretNames = []string{"DATABASE_URL", "JWT_SECRET", "IAMPORT_KEY", "IAMPORT_SECRET"}

var commandNeeds = map[string][]string{
	"": secretNames, "import": {"DATABASE_URL"}, "token": {"JWT_SECRET"}, "audit": {"DATABASE_URL", "IAMPORT_KEY", "IAMPORT_SECRET"},
}

// readConfig reads what command needs, and says everything that is wrong with it at once. A value that may be a secret is
// never part of the error.
func readConfig(getenv func(string) string, command string) (config, error) {
	var problems []error
	problem := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	or := func(name, byDefault string) string {
		if value := strings.TrimSpace(getenv(name)); value != "" {
			return value
		}
		return byDefault
	}
	c := config{
		databaseURL: or("DATABASE_URL", ""), jwtSecret: []byte(getenv("JWT_SECRET")),
		iamportKey: or("IAMPORT_KEY", ""), iamportSecret: or("IAMPORT_SECRET", ""),
		iamportURL: strings.TrimSuffix(or("IAMPORT_URL", "https://api.iamport.kr"), "/"),
	}
	c.local = !slices.ContainsFunc(secretNames, func(name string) bool { return getenv(name) != "" })
	if !c.local {
		for _, name := range commandNeeds[command] {
			if getenv(name) == "" {
				problem("%s is not set (with none of %s set, the service runs in local development)", name, strings.Join(secretNames, ", "))
			}
		}
		if n := len(c.jwtSecret); n > 0 && n < 32 {
			problem("JWT_SECRET has %d bytes; at least 32 are needed", n)
		}
	}
	if !strings.HasPrefix(c.iamportURL, "https://") && !strings.HasPrefix(c.iamportURL, "http://") {
		problem("IAMPORT_URL must begin with https:// or http://")
	}
	var err error
	if c.sandbox, err = strconv.ParseBool(or("IAMPORT_SANDBOX", "false")); err != nil {
		problem("IAMPORT_SANDBOX must be true or false")
	}
	if c.port, err = strconv.Atoi(or("PORT", "5000")); err != nil || c.port < 0 || c.port > 65535 {
		problem("PORT must be a number up to 65535")
	}
	if c.shipping, err = strconv.ParseInt(or("SHIPPING_PRICE", "10000"), 10, 64); err != nil || c.shipping < 0 || c.shipping > maxPrice {
		problem("SHIPPING_PRICE must be whole won, 0 or more")
	}
	if c.metricsAddress = or("METRICS_ADDR", ""); c.metricsAddress != "" {
		if _, _, err := net.SplitHostPort(c.metricsAddress); err != nil {
			problem("METRICS_ADDR must be host:port, such as 127.0.0.1:9100")
		}
	}
	duration := func(name, byDefault string) time.Duration {
		d, err := time.ParseDuration(or(name, byDefault))
		if err != nil || d <= 0 {
			problem("%s must be a duration such as %s", name, byDefault)
		}
		return d
	}
	c.hold, c.reconcile = duration("ORDER_HOLD", "30m"), duration("RECONCILE_INTERVAL", "10s")
	for origin := range strings.SplitSeq(getenv("CORS_ORIGINS"), ",") {
		if origin = strings.TrimSuffix(strings.TrimSpace(origin), "/"); origin == "" {
			continue
		}
		if !strings.Contains(origin, "://") || strings.Contains(origin, "*") {
			problem("CORS_ORIGINS lists exact origins such as https://lumiere.example, not %q", origin)
		}
		c.origins = append(c.origins, origin)
	}
	for proxy := range strings.SplitSeq(getenv("TRUSTED_PROXIES"), ",") {
		if proxy = strings.TrimSpace(proxy); proxy == "" {
			continue
		}
		prefix, err := parseProxy(proxy)
		if err != nil {
			problem("TRUSTED_PROXIES lists addresses and networks such as 10.0.0.0/8, not %q", proxy)
		}
		c.proxies = append(c.proxies, prefix)
	}
	if err := c.logLevel.UnmarshalText([]byte(or("LOG_LEVEL", "info"))); err != nil {
		problem("LOG_LEVEL must be debug, info, warn or error")
	}
	return c, errors.Join(problems...)
}

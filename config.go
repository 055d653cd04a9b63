package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
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
	taxFree                   bool // payments through Iamport are made tax-free
	portoneSecret             string
	portoneURL                string
	portoneStoreID            string   // empty: all stores of the account are ours
	webhookSecrets            [][]byte // of PortOne's notices; empty: they are not signed
	sandbox                   bool     // accept payments of test channels
	port                      int
	metricsAddress            string         // host:port of /metrics; metrics are not served when empty
	origins                   []string       // web origins that CORS allows
	proxies                   []netip.Prefix // reverse proxies whose X-Forwarded-For is trusted
	shipping                  int64          // shipping price of an order, in KRW
	hold                      time.Duration  // how long an unpaid order keeps its paintings
	reconcile                 time.Duration  // time between two rounds of the reconciler
	notifyURLs                []*url.URL     // addresses that notifications go to
	notifyKey                 []byte         // signs notifications
	keep                      time.Duration  // how long after its last change a paid order keeps personal data
	logLevel                  slog.Level
	local                     bool // local development
}

// secretNames lists the variables that have no default. Of the gateways' one is enough: see checkGateway.
var secretNames = []string{"DATABASE_URL", "JWT_SECRET", "IAMPORT_KEY", "IAMPORT_SECRET", "PORTONE_API_SECRET"}

// requiredNames lists the variables that a command requires outside local development, by command. The command that
// serves is "". That one and audit require a gateway, too: see checkGateway.
var requiredNames = map[string][]string{
	"":        {"DATABASE_URL", "JWT_SECRET"},
	"import":  {"DATABASE_URL"},
	"migrate": {"DATABASE_URL"},
	"token":   {"JWT_SECRET"},
	"audit":   {"DATABASE_URL"},
	"export":  {"DATABASE_URL"},
	"forget":  {"DATABASE_URL"},
}

// deploymentNames lists further variables that only a deployment sets. A deployment that lost its secrets is recognized by
// them: it must not serve local development's tokens.
var deploymentNames = []string{"PORTONE_STORE_ID", "PORTONE_WEBHOOK_SECRET", "TRUSTED_PROXIES", "CORS_ORIGINS", "METRICS_ADDR",
	"NOTIFY_URL", "NOTIFY_SECRET"}

// readConfig returns the configuration for command. The error lists every problem at once, and never contains the value
// of a secret. In local development the secrets and the gateways' addresses stay empty: devEnv sets its own.
func readConfig(getenv func(string) string, command string) (config, error) {
	env := &environment{getenv: getenv}
	c := config{
		sandbox:        env.boolean("IAMPORT_SANDBOX"),
		taxFree:        env.boolean("IAMPORT_TAX_FREE"),
		port:           env.port(),
		shipping:       env.shipping(),
		metricsAddress: env.metricsAddress(),
		hold:           env.duration("ORDER_HOLD", "30m"),
		reconcile:      env.duration("RECONCILE_INTERVAL", "10s"),
		keep:           env.keepPersonalData(),
		origins:        env.origins(),
		proxies:        env.proxies(),
		logLevel:       env.logLevel(),
		local:          env.boolean("LOCAL") || !env.isDeployment(),
	}
	c.notifyURLs, c.notifyKey = env.notifications(c.local)
	if !c.local {
		env.checkSecrets(command)
		c.databaseURL = env.text("DATABASE_URL", "")
		c.jwtSecret = []byte(env.text("JWT_SECRET", ""))
		c.iamportKey, c.iamportSecret = env.text("IAMPORT_KEY", ""), env.text("IAMPORT_SECRET", "")
		c.iamportURL = env.gatewayURL("IAMPORT_URL", "https://api.iamport.kr")
		c.portoneSecret, c.portoneStoreID = env.text("PORTONE_API_SECRET", ""), env.text("PORTONE_STORE_ID", "")
		c.portoneURL = env.gatewayURL("PORTONE_URL", "https://api.portone.io")
		c.webhookSecrets = env.webhookSecrets()
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

// text returns the variable without surrounding space, or fallback when nothing is left. Every variable is read through text
// or list, so that a blank one is not set.
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

// isDeployment reports whether any variable of secretNames or deploymentNames is set.
func (e *environment) isDeployment() bool {
	return slices.ContainsFunc(slices.Concat(secretNames, deploymentNames), func(name string) bool { return e.text(name, "") != "" })
}

// checkSecrets checks that what command requires is set, and that the JWT secret is as long as RFC 7518 section 3.2
// demands for HS256.
func (e *environment) checkSecrets(command string) {
	for _, name := range requiredNames[command] {
		if e.text(name, "") == "" {
			e.problem("%s is not set (the service runs in local development with LOCAL=1, or with none of %s set)",
				name, strings.Join(slices.Concat(secretNames, deploymentNames), ", "))
		}
	}
	if command == "" || command == "audit" {
		e.checkGateway()
	}
	if n := len(e.text("JWT_SECRET", "")); n > 0 && n < 32 {
		e.problem("JWT_SECRET has %d bytes; at least 32 are needed", n)
	}
}

// checkGateway checks that a gateway is configured: V1 by its two keys, V2 by its secret, or both.
func (e *environment) checkGateway() {
	unset := func(name string) bool { return e.text(name, "") == "" }
	v1 := []string{"IAMPORT_KEY", "IAMPORT_SECRET"}
	v2 := !unset("PORTONE_API_SECRET")
	if v2 && unset(v1[0]) && unset(v1[1]) {
		return
	}
	missing := slices.DeleteFunc(v1, func(name string) bool { return !unset(name) })
	if !v2 && (len(missing) == 2 || !unset("PORTONE_STORE_ID") || !unset("PORTONE_WEBHOOK_SECRET")) {
		missing = append(missing, "PORTONE_API_SECRET")
	}
	for _, name := range missing {
		e.problem("%s is not set (a gateway needs IAMPORT_KEY and IAMPORT_SECRET, or PORTONE_API_SECRET, or all three)", name)
	}
}

// webhookSecrets returns the keys that PortOne's notices are signed with: the old and the new one while they change.
func (e *environment) webhookSecrets() (keys [][]byte) {
	for element := range e.list("PORTONE_WEBHOOK_SECRET") {
		text, ok := strings.CutPrefix(element, "whsec_")
		key, err := base64.StdEncoding.DecodeString(text)
		if !ok || err != nil || len(key) == 0 {
			e.problem("PORTONE_WEBHOOK_SECRET lists secrets that are whsec_ and base64")
		}
		keys = append(keys, key)
	}
	return keys
}

// gatewayURL returns a gateway's address. It must be encrypted, because each call carries a token that moves money; a
// gateway on this machine need not.
func (e *environment) gatewayURL(name, fallback string) string {
	text := strings.TrimSuffix(e.text(name, fallback), "/")
	u, err := url.Parse(text)
	if err != nil || !isSecureURL(u) {
		e.problem("%s must begin with https:// (http:// only to this machine)", name)
	}
	return text
}

// isSecureURL reports whether u is an address whose traffic others cannot read: of https, or of this machine.
func isSecureURL(u *url.URL) bool {
	return u.Hostname() != "" && (u.Scheme == "https" || u.Scheme == "http" && isLoopback(u.Hostname()))
}

// isLoopback reports whether host is a name or an address of this machine alone.
func isLoopback(host string) bool {
	address, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && address.Unmap().IsLoopback()
}

// boolean returns a variable that is false by default.
func (e *environment) boolean(name string) bool {
	value, err := strconv.ParseBool(e.text(name, "false"))
	if err != nil {
		e.problem("%s must be true or false", name)
	}
	return value
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

func (e *environment) keepPersonalData() time.Duration {
	keep := e.duration("KEEP_PERSONAL_DATA", "43830h")
	if keep > 0 && keep < keepUnpaid {
		e.problem("KEEP_PERSONAL_DATA must be at least %.0fh", keepUnpaid.Hours())
	}
	return keep
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

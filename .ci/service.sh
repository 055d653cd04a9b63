# Functions for scripts that try a service as a newcomer starts it. A script sources this file in the root of a clone;
# PORT and XDG_CACHE_HOME say where the service listens and keeps its database.

base=http://127.0.0.1:${PORT:-5000}
work=$(mktemp -d)
log=$work/log
walk=$work/walk.sh # what readme writes
runner= # process id of `go run .`

cleanup() {
	if [ -n "$runner" ]; then
		pkill -TERM -P "$runner" || true
		timeout 15 tail -s 0.1 -f --pid="$runner" /dev/null || pkill -KILL -P "$runner" || kill -KILL "$runner" || true
		wait "$runner" || true
	fi
	rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 1' INT TERM HUP

fail() {
	echo "$*" >&2
	[ ! -s "$log" ] || tail -20 "$log" >&2
	exit 1
}

# answers reports whether a GET of the URL succeeds.
answers() { curl -fsS -m 5 -o /dev/null "$1" 2>/dev/null; }

ready() { answers "$base/readyz"; }

# start runs the service in the background until it is ready; the first time everything is compiled.
start() {
	go run . >"$log" 2>&1 &
	runner=$!
	local deadline=$((SECONDS + 300))
	until ready; do
		kill -0 "$runner" 2>/dev/null || fail "the service ended instead of starting"
		[ $SECONDS -lt $deadline ] || fail "the service is not ready after five minutes"
		sleep 0.1
	done
	echo "ready after $((SECONDS + 300 - deadline)) s"
}

# signal NAME sends the service itself a signal, and sets status to the exit code of `go run .`.
signal() {
	local service deadline=$((SECONDS + 10))
	service=$(pgrep -P "$runner")
	kill "-$1" "$service"
	while kill -0 "$runner" 2>/dev/null; do
		[ $SECONDS -le $deadline ] || fail "the service goes on ten seconds after SIG$1"
		sleep 0.1
	done
	status=0
	wait "$runner" || status=$?
	runner=
}

# readme writes what README.md has a newcomer paste, in order, into the script $walk. That is its blocks fenced with ```sh,
# except `go run .`, which goes on in another terminal, and blocks with `git clone` or `go test`. What is only to be read,
# or needs a machine we do not have, is fenced with ```console or ```text.
readme() {
	awk -v dir="$work" '
		/^```sh$/ { file = sprintf("%s/block-%03d", dir, ++count); next }
		/^```/    { file = ""; next }
		file      { print > file }' README.md
	local block serves=no
	for block in "$work"/block-*; do
		if [ "$(cat "$block")" = "go run ." ]; then
			serves=yes
		elif ! grep -qE 'git clone|go test' "$block"; then
			{
				printf "echo '-- README.md:'; cat <<'END_OF_BLOCK'\n%s\nEND_OF_BLOCK\n" "$(cat "$block")"
				cat "$block"
			} >>"$walk"
		fi
	done
	[ $serves = yes ] || fail "README.md has no block that is \`go run .\`"
	[ -s "$walk" ] || fail "README.md has no other block to run"
}

#!/usr/bin/env bash
# backup.sh FILE: this installation's state (functions, models, profiles, recordings, passwords) as one file, while it
# runs or not. NATS, Redis, rapp and the scaler stand still meanwhile; requests are served all the time.
set -euo pipefail
[[ $# == 1 ]] || { echo "usage: backup.sh FILE" >&2; exit 2; }
file=$(realpath --canonicalize-missing -- "$1")
cd "$(dirname "$0")"
read -ra compose <<<"${COMPOSE:-$(docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)}"
die() { echo "backup: $*" >&2; exit 1; }

[[ ! -e $file ]] || die "$file is there already: name a new file"
[[ -d $(dirname "$file") && -w $(dirname "$file") ]] || die "$(dirname "$file") is no folder that can be written to"
umask 077 # the passwords are in it
draft=$file.part
running=$("${compose[@]}" ps --services --filter status=running) || die "Compose failed, see above"
read -ra writers <<<"$(tr '\n' ' ' <<<"$running" | grep -oE '\b(nats|redis|rapp|scaler)\b' | tr '\n' ' ' || true)"

go_on() {
  [[ ${#writers[@]} == 0 ]] || "${compose[@]}" unpause "${writers[@]}" >/dev/null 2>&1 ||
    echo "backup: can't let them go on: ${compose[*]} unpause ${writers[*]}" >&2
  writers=()
}
trap 'go_on; rm -f "$draft"' EXIT

began=$SECONDS
[[ ${#writers[@]} == 0 ]] || "${compose[@]}" pause "${writers[@]}" >/dev/null 2>&1 || die "can't pause ${writers[*]}"
"${compose[@]}" run --rm -T backup save >"$draft" 2> >(grep --line-buffered '^hasgpu: ' >&2) || die "nothing was written"
go_on
paused=$((SECONDS - began))
"${compose[@]}" run --rm -T backup check <"$draft" >/dev/null 2>&1 || die "what was written can't be read back: try again"
mv "$draft" "$file"
echo "backup: $file, $(stat --format %s "$file") bytes; scaling stood still for $paused s"

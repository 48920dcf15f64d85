#!/usr/bin/env bash
# Print where debootstrap fetches Debian: DEBIAN_MIRROR, else the mirror in this machine's apt sources; exit 1 where neither is.
set -euo pipefail
mirror="${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(LABEL) $(COMPONENT) $(REPO_URI)' 'Identifier: Packages' 2>/dev/null |
    awk '$1 == "Debian" && $2 == "main" && !found { print $3; found = 1 }')}"
[ -n "$mirror" ] && echo "$mirror"

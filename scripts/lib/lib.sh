# Shell that the commands share: messages, Docker, Debian packages, the Python environment.
# Sourced with $root set to the repository's root; never run by itself. POSIX sh.
# shellcheck shell=sh disable=SC2016,SC2034,SC2154

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }

# die CODE MESSAGE: the message names the fix.
die() {
    code=$1
    shift
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit "$code"
}

# The comment at the top of a command is its help.
usage() { sed -n '2,/^[^#]/{ s/^# \{0,1\}//p; }' "$1"; }

have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command as root: at once, or by a sudo that does not ask.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# --- Docker ---------------------------------------------------------------------------------------

# True when an engine and compose v2 answer; otherwise $docker_problem says what is missing.
docker_ready() {
    docker_problem=
    if ! have docker; then
        docker_problem="the docker command is not installed"
    elif ! engine_version=$(docker version --format '{{.Server.Version}}' 2>&1); then
        docker_problem="the Docker engine does not answer ($(printf '%s' "$engine_version" | tail -n 1))"
    elif ! compose_version=$(docker compose version --short 2>&1); then
        docker_problem="the compose plugin (docker compose, version 2) is not installed"
    else
        case $engine_version in
            # The health checks' start_interval came with 25.
            [0-9].* | 1[0-9].* | 2[0-4].*)
                docker_problem="Docker engine $engine_version is too old; 25 or newer is needed"
                ;;
        esac
        case ${compose_version#v} in
            1.* | 2.[0-9].* | 2.1[0-9].* | 2.2[0-3].*)
                docker_problem="docker compose $compose_version is too old; 2.24 or newer is needed"
                ;;
        esac
    fi
    [ -z "$docker_problem" ]
}

# --- Debian packages, without touching the system -------------------------------------------------
# Prometheus 3 and Alertmanager come from Debian's forky; its packages of these run on bookworm. An
# apt of our own under .local/ reads forky from the mirror that this machine already uses.

# The first Debian archive among apt's sources, in either of their formats; nothing without one.
debian_mirror() {
    {
        sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources 2>/dev/null | tr -s ' ' '\n' || true
        sed -n 's/^deb \(\[[^]]*\] \)\{0,1\}\([^ ]*\) .*/\2/p' /etc/apt/sources.list \
            /etc/apt/sources.list.d/*.list 2>/dev/null || true
    } | sed 's:/*$:/:' | grep '/debian/$' | head -n 1
}

debian_keyring() {
    for keyring in $(sed -n 's/^Signed-By: *\(\/[^ ]*\)$/\1/p' /etc/apt/sources.list.d/*.sources 2>/dev/null) \
        /usr/share/keyrings/debian-archive-keyring.gpg; do
        case $keyring in *debian*) [ -r "$keyring" ] && { printf '%s\n' "$keyring"; return; } ;; esac
    done
}

# The forky source in apt's own format.
forky_source() {
    mirror=$(debian_mirror)
    keyring=$(debian_keyring)
    [ -n "$mirror" ] && [ -n "$keyring" ] || return 1
    printf 'Types: deb\nURIs: %s\nSuites: forky\nComponents: main\nSigned-By: %s\nCheck-Valid-Until: no\n' \
        "$mirror" "$keyring"
}

forky_apt() {
    apt_home=$root/.local/apt
    verb=$1
    shift
    apt-get -q -o "Dir::Etc::SourceList=/dev/null" -o "Dir::Etc::SourceParts=$apt_home/sources" \
        -o "Dir::State::Lists=$apt_home/lists" -o "Dir::Cache=$apt_home/cache" \
        -o "Dir::Etc::PreferencesParts=$apt_home/none" -o "Dir::Etc::Preferences=$apt_home/none" \
        -o "APT::Sandbox::User=root" -o "Debug::NoLocking=1" "$verb" "$@"
}

# forky_download DIR PACKAGE...: fetches the .deb files, installs nothing.
forky_download() {
    directory=$1
    shift
    if ! have apt-get; then
        warn "no apt on this machine"
        return 1
    fi
    mkdir -p "$root/.local/apt/sources" "$root/.local/apt/lists/partial" \
        "$root/.local/apt/cache/archives/partial" "$directory"
    if ! forky_source >"$root/.local/apt/sources/forky.sources"; then
        warn "no Debian mirror among this machine's apt sources"
        return 1
    fi
    if ! forky_apt update >"$root/.local/apt/log" 2>&1 ||
        ! (cd "$directory" && forky_apt download "$@" >>"$root/.local/apt/log" 2>&1); then
        tail -n 5 "$root/.local/apt/log" >&2
        return 1
    fi
}

# Puts prometheus, promtool, prometheus-alertmanager and amtool on PATH: the machine's own when it
# has them, otherwise Debian's under .local/. On failure $binaries_problem says what is missing.
find_binaries() {
    PATH=$PATH:$root/.local/bin
    export PATH
    binaries_problem=
    missing=$(missing_binaries)
    if [ -n "$missing" ] && [ "${1-}" = install ]; then
        say "fetching Prometheus and Alertmanager from Debian (missing: $missing)"
        debs=$root/.local/debs
        if forky_download "$debs" prometheus promtool prometheus-alertmanager; then
            mkdir -p "$root/.local/bin"
            for deb in "$debs"/*.deb; do dpkg --extract "$deb" "$debs"; done
            alertmanager_templates || rm -f "$debs/usr/bin/prometheus-alertmanager"
            for name in $missing; do
                if [ -x "$debs/usr/bin/$name" ]; then cp "$debs/usr/bin/$name" "$root/.local/bin/$name"; fi
            done
            rm -rf "$debs"
        fi
        missing=$(missing_binaries)
    fi
    [ -z "$missing" ] && return 0
    binaries_problem="not on PATH: $missing. Install Prometheus 3 and Alertmanager (the releases of the projects prometheus/prometheus and prometheus/alertmanager, or Debian forky's packages) and put them on PATH"
    return 1
}

# Debian's Alertmanager reads its templates from there and does not start without them.
alertmanager_templates() {
    templates=/usr/share/prometheus/alertmanager
    [ ! -e "$templates/default.tmpl" ] || return 0
    say "putting Alertmanager's templates into $templates"
    as_root mkdir -p "$templates" && as_root cp "$debs$templates"/*.tmpl "$templates/"
}

missing_binaries() {
    for name in prometheus promtool prometheus-alertmanager amtool; do
        have "$name" && continue
        # The project's own release calls the program alertmanager; Debian prefixes it.
        if [ "$name" = prometheus-alertmanager ] && have alertmanager; then
            mkdir -p "$root/.local/bin"
            ln -sf "$(command -v alertmanager)" "$root/.local/bin/prometheus-alertmanager"
            continue
        fi
        printf '%s ' "$name"
    done
}

# --- The Python environment -----------------------------------------------------------------------

# A Python that the locks fit.
pick_python() {
    for candidate in python3.11 python3.12 python3.13 python3; do
        if have "$candidate" &&
            "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# torch_hint LOCK: what to do where a torch that the lock names is not found.
torch_hint() {
    grep -q '^torch==' "$root/$1" || return 0
    printf '%s' "If it is torch==…+cpu that is not found: set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, or PIP_FIND_LINKS to a directory that holds the wheel."
}

# environment [--dry-run]: makes .venv match the locks; at once when nothing changed.
environment() {
    locked_environment .venv "worker/requirements/cpu.txt tests/requirements.txt" \
        "the locked CPU vLLM and the tools (600 MB the first time)" "${1-}"
}

# The same without vLLM: what most of the unit tests need.
light_environment() {
    locked_environment .venv-light tests/requirements-light.txt \
        "what the unit tests need without vLLM (35 small wheels)" "${1-}"
}

# locked_environment NAME LOCKS WHAT [--dry-run]: sets $venv and $python.
locked_environment() {
    venv=$root/$1
    python=$venv/bin/python
    locks=$2
    # shellcheck disable=SC2086  # a list of files
    locked=$(cd "$root" && cat $locks pyproject.toml | sha256sum | cut -c1-16)
    if [ -x "$python" ] && [ "$(cat "$venv/.locked" 2>/dev/null)" = "$locked" ]; then
        return 0
    fi
    if [ "${4-}" = --dry-run ]; then
        say "would make $1 and install $locks and this package"
        return 0
    fi
    if [ ! -x "$python" ]; then
        base_python=$(pick_python) ||
            die 6 "no Python 3.11 or newer with venv: install it (Debian: apt-get install python3-venv)"
        say "making $1 with $base_python"
        "$base_python" -m venv "$venv" || die 6 "$base_python cannot make a virtual environment in $1"
    fi
    say "installing $3"
    have uv || [ -x "$venv/bin/uv" ] || "$python" -m pip install --quiet uv 2>/dev/null || true
    for lock in $locks; do
        install_locked --requirement "$lock" || die 6 "cannot install $lock. $(torch_hint "$lock")"
    done
    install_locked --no-build-isolation --editable . || die 6 "cannot install this package into $1"
    printf '%s\n' "$locked" >"$venv/.locked"
}

# uv when there is one, with pip's own settings; pip when uv is absent or cannot. Compiled once here
# (pip does that by itself): an engine is three processes, and each of them imports all of vLLM.
install_locked() {
    uv=$venv/bin/uv
    [ -x "$uv" ] || uv=$(command -v uv || true)
    if [ -n "$uv" ]; then
        if (
            eval "$("$python" "$root/scripts/lib/uv_settings.py")"
            cd "$root" && "$uv" pip install --quiet --compile-bytecode --python "$python" --no-deps "$@"
        ); then
            return 0
        fi
        warn "uv cannot; trying pip"
    fi
    (cd "$root" && "$python" -m pip install --quiet --disable-pip-version-check --no-deps "$@")
}

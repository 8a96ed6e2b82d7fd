# What GitHub's runner has `docker` do, in its order and with its arguments: actions/runner, ContainerOperationProvider.cs (StartContainersAsync,
# StopContainersAsync), DockerCommandManager.cs, StepHost.cs and ContainerActionHandler.cs. Each job is a function; IMAGE has busybox.
label=0a1b2c work=$PWD workspace=$PWD/NAME/NAME temp=$PWD/_temp
mkdir -p "$workspace" "$temp/_github_home" "$temp/_github_workflow" "$temp/_runner_file_commands" _actions _tool

# The least that the runner takes, of the server's version and the client's.
versions() {
    for side in Server Client; do
        version=$(docker version --format "'{{.$side.APIVersion}}'" | grep -oE '[0-9]+\.[0-9]+' | head -n 1)
        [ "${version%.*}" -gt 1 ] || [ "${version#*.}" -ge 35 ]
    done
}

# Prepares a network.
prepare() {
    versions
    [ -z "$(docker ps --all --quiet --no-trunc --filter "label=$label")" ]
    docker network prune --force --filter "label=$label"
    network=github_network_$1
    docker network create --label $label "$network"
}

# Starts a container that was created, as each is.
started() {
    docker start "$1"
    case $(docker ps --all --filter id="$1" --filter status=running --no-trunc --format "{{.ID}} {{.Status}}") in
        "$1"*) ;;
        *) docker logs --details "$1" && exit 1 ;;
    esac
}

# A service: a web server that is healthy once it answers. Its mapped port is `port`.
service() {
    docker pull IMAGE
    service=$(docker create --name "web_IMAGE_$1" --label $label --network "$network" --network-alias web -p 80 \
        --health-cmd "wget -q -O /dev/null http://localhost/greeting" --health-interval 1s --health-retries 60 \
        -e "GREETING=hello from the service" -e GITHUB_ACTIONS=true -e CI=true --entrypoint "sh" IMAGE \
        "-c" "echo started && cd /tmp && sleep 2 && echo \$GREETING >greeting && exec httpd -f -p 80 -h /tmp")
    started "$service"
    port=$(docker port "$service" | sed -nE 's/^80\/tcp -> .+:([0-9]+)$/\1/p' | head -n 1)
    [ "$port" -gt 0 ]
}

healthy() {
    while true; do
        health=$(docker inspect --format="{{if .Config.Healthcheck}}{{print .State.Health.Status}}{{end}}" "$service")
        [ "$health" = starting ] || break
        sleep 1
    done
    [ "$health" = healthy ]
}

# Has a Docker action built, which the job's own steps can look at, and run; further arguments are the network's.
action() {
    action=$work/_actions/OWNER/ACTION/v1
    mkdir -p "$action"
    cat >"$action/Dockerfile" <<'END'
FROM IMAGE
RUN echo built >/built
COPY entry /entry
ENTRYPOINT ["sh", "/entry"]
END
    cat >"$action/entry" <<'END'
set -e
[ "$*" = "two words" ]; [ "$(cat /built)" = built ]; [ "$PWD" = /github/workspace ]
echo "$INPUT_WHO by an action" >by-action
echo "result=done" >>"$GITHUB_OUTPUT"
[ ! -e /run/lvm-cache-friend/late ] || echo action >/run/lvm-cache-friend/late/action
END
    docker build -t $label:00ff -f "$action/Dockerfile" "$action"
}
run_action() {
    rm -f "$workspace/by-action" "$temp/_runner_file_commands/output"
    INPUT_WHO=greeted GITHUB_OUTPUT=/github/file_commands/output docker run --name "${label}00ff_1" --label $label --workdir /github/workspace --rm \
        -e "INPUT_WHO" -e "GITHUB_OUTPUT" -e GITHUB_ACTIONS=true -e CI=true "$@" -v "/var/run/docker.sock":"/var/run/docker.sock" \
        -v "$temp":"/github/runner_temp" -v "$temp/_github_home":"/github/home" -v "$temp/_github_workflow":"/github/workflow" \
        -v "$temp/_runner_file_commands":"/github/file_commands" -v "$workspace":"/github/workspace" $label:00ff "two words"
    [ "$(cat "$workspace/by-action")" = "greeted by an action" ]
    [ "$(cat "$temp/_runner_file_commands/output")" = result=done ]
    # Whoever did it is root there, and this user here.
    [ "$(stat -c %u "$workspace/by-action")" = "$(id -u)" ]
}

# Ends a container and, last, the network; then nothing is left.
clean() {
    [ "$(docker logs --details "$service")" = started ]
    for container; do docker rm --force "$container"; done
    docker network rm "$network"
    [ -z "$(docker ps --all --quiet)" ]
    [ "$(docker network ls --quiet | wc -l)" = 1 ]
    while cat /proc/[0-9]*/comm 2>/dev/null | grep -E 'conmon|slirp4netns|pasta|passt|aardvark|rootlessport'; do sleep 0.1; done
}

# `container:`, `services:` and a Docker action.
in_container() {
    interfaces=$(cut -d : -f 1 /proc/net/dev)
    action
    prepare 1
    docker pull IMAGE
    job=$(docker create --name job_IMAGE_1 --label $label --workdir /__w/NAME/NAME --network "$network" -e "HOME=/github/home" \
        -e GITHUB_ACTIONS=true -e CI=true -v "/var/run/docker.sock":"/var/run/docker.sock" -v "$work":"/__w" -v "/opt/runner/externals":"/__e":ro \
        -v "$temp":"/__w/_temp" -v "$work/_actions":"/__w/_actions" -v "$work/_tool":"/__w/_tool" -v "$temp/_github_home":"/github/home" \
        -v "$temp/_github_workflow":"/github/workflow" --entrypoint "tail" IMAGE "-f" "/dev/null")
    started "$job"
    path=$(docker inspect --format "{{range .Config.Env}}{{println .}}{{end}}" "$job" | sed -n 's/^PATH=//p')
    service 1
    healthy
    # Of the containers' network nothing is in the runner's.
    [ "$interfaces" = "$(cut -d : -f 1 /proc/net/dev)" ]
    docker exec "$job" sh -c "cat /etc/*release | grep ^ID" || true
    cat >"$temp/step.sh" <<'END'
set -x
[ "$STEP" = "a step" ] && [ "$(id -u)" = 0 ] && [ "$HOME" = /github/home ] && touch /github/home/x
# By its name, and by the name alone.
[ "$(wget -q -O - http://web/greeting)" = "hello from the service" ]
! wget -q -O - http://localhost/greeting
! touch /__e/x
echo checkout >/__w/NAME/NAME/file
[ -S /var/run/docker.sock ]
/run/lvm-cache-friend/bin/lvm-cache-friend restore late --key linux
echo step >/run/lvm-cache-friend/late/step
END
    STEP="a step" docker exec -i --workdir /__w/NAME/NAME -e "STEP" -e PATH="/added:$path" "$job" sh -e /__w/_temp/step.sh
    [ "$(cat "$workspace/file")" = checkout ]
    run_action --network "$network"
    # Who has the socket has the same containers.
    [ "$(podman --remote --url unix:///var/run/docker.sock ps --quiet | wc -l)" = 2 ]
    clean "$job" "$service"
}

# `services:` alone, for steps that run beside them; and an action without a network of its own.
beside() {
    lvm-cache-friend restore late --key linux --save ""
    [ "$(cat /run/lvm-cache-friend/late/step /run/lvm-cache-friend/late/action)" = "step
action" ]
    action
    prepare 2
    service 2
    healthy
    [ "$(wget -q -O - "http://localhost:$port/greeting")" = "hello from the service" ]
    run_action --network "$network"
    clean "$service"
    run_action
    # What steps do themselves.
    docker run -d --rm --name own -p 80 IMAGE httpd -f -h /etc
    port=$(docker port own | sed -nE 's/^80\/tcp -> .+:([0-9]+)$/\1/p' | head -n 1)
    wget -q -O /dev/null "http://localhost:$port/passwd"
    docker rm -f own
}

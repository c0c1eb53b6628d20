# SPDX-License-Identifier: LGPL-2.1-or-later
# bash completion of ckptctl: installed as .../share/bash-completion/completions/ckptctl
# A test compares commands and options with those of the program.

__ckptctl_column() {
    # first column of a listing, asked of the daemon that the command line names
    local -a daemon=()
    local i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            --system|--user|--standalone) daemon+=("${COMP_WORDS[i]}") ;;
            --address|--spool) daemon+=("${COMP_WORDS[i]}" "${COMP_WORDS[i + 1]}"); i=$((i + 1)) ;;
        esac
    done
    "${COMP_WORDS[0]}" "$1" --no-legend "${daemon[@]}" 2>/dev/null | while read -r first _; do printf '%s\n' "$first"; done
}

__ckptctl_targets() {
    local first
    systemctl list-units --plain --no-legend --type=service,scope 2>/dev/null |
        while read -r first _; do printf '%s\n' "$first"; done
    for first in /proc/[0-9]*; do printf '%s\n' "${first#/proc/}"; done
}

__ckptctl_cgroups() {
    local directory
    find /sys/fs/cgroup -mindepth 1 -type d 2>/dev/null |
        while read -r directory; do printf '%s\n' "${directory#/sys/fs/cgroup}"; done
}

__ckptctl_sysv() {
    # semaphores and message queues: sem:ID, msg:ID
    local type
    for type in sem msg; do
        tail -n +2 "/proc/sysvipc/$type" 2>/dev/null | while read -r _ id _; do echo "$type:$id"; done
    done
}

__ckptctl_words() {
    # the words of $1, one a line on standard input or in the argument, that begin with what was typed
    local IFS=$'\n'
    COMPREPLY=($(compgen -W "$1" -- "$cur"))
}

_ckptctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} command='' i
    local common='--help --json --no-legend --all --system --user --address --standalone --spool'
    local commands='checkpoint restore check tree freeze thaw jobs cancel list show verify remove export import inhibit inhibitors monitor doctor demo'
    local -A options=(
        [checkpoint]='--freeze --timeout --kill --force --leave-frozen --save-files --save-limit --external --sysv --as-root --detach --quiet'
        [restore]='--wait --detach --new-pidns --clamp --force --cgroup --leave-stopped --changed-files --terminal --inherit --dry-run'
        [check]='--external --sysv --as-root'
        [tree]='--files --threads'
        [freeze]='--freeze --timeout'
        [export]='--format --force'
        [inhibit]='--who --why'
        [demo]='--freeze --keep'
    )

    case $prev in
        --freeze) __ckptctl_words $'auto\ncgroup\nunit\nptrace\ncaller'; return ;;
        --format) __ckptctl_words $'core\ntar'; return ;;
        --timeout) __ckptctl_words $'500ms\n10s\n30s\n2min'; return ;;
        --save-limit) __ckptctl_words $'64M\n256M\n1G\n4G'; return ;;
        --external) __ckptctl_words $'any:close\nany:keep\nany:reconnect\nany:inherit'; return ;;
        --sysv) __ckptctl_words "$(__ckptctl_sysv)"; return ;;
        --changed-files) __ckptctl_words $'refuse\naccept\nrollback'; return ;;
        --terminal) __ckptctl_words 'detach'; return ;;
        --inherit) __ckptctl_words 'any='; return ;;
        --cgroup) __ckptctl_words "$(__ckptctl_cgroups)"; return ;;
        --spool) compopt -o filenames; COMPREPLY=($(compgen -d -- "$cur")); return ;;
        --address|--who|--why) COMPREPLY=(); return ;;
    esac
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            --address|--spool|--freeze|--timeout|--save-limit|--external|--sysv|--changed-files|--terminal|--inherit|--cgroup|--format|--who|--why) i=$((i + 1)) ;;
            -*) ;;
            *) command=${COMP_WORDS[i]}; break ;;
        esac
    done

    if [[ -z $command ]]; then
        COMPREPLY=($(compgen -W "$commands $common --version" -- "$cur"))
    elif [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "${options[$command]} $common" -- "$cur"))
    else
        case $command in
            checkpoint|check|freeze|thaw|inhibit) __ckptctl_words "$(__ckptctl_targets)" ;;
            tree) __ckptctl_words "$(__ckptctl_column list; __ckptctl_targets)" ;;
            cancel) __ckptctl_words "$(__ckptctl_column jobs)" ;;
            show|verify|remove|restore) __ckptctl_words "$(__ckptctl_column list)" ;;
            export)
                compopt -o filenames
                __ckptctl_words "$(__ckptctl_column list)"
                COMPREPLY+=($(compgen -f -- "$cur")) ;;
            import) compopt -o filenames; COMPREPLY=($(compgen -f -- "$cur")) ;;
        esac
    fi
}

complete -F _ckptctl ckptctl

# Run on each host by `megatrain launch ssh`: starts the node's script ($1) and ends it together with the connection.
# sshd does not: what it has started would train on, and hold its port, after the launching machine is gone.
exec 3<&0  # names of signals come in here; the end of the file is the end of the connection
bash -c "$1" </dev/null 3<&- &
node=$!
(
  while read -r signal <&3; do kill -s "$signal" "$node"; done
  kill -s TERM "$node"  # the run saves
  sleep "$2"            # seconds that it has for that
  kill -s KILL "$node"
) 2>/dev/null &
reader=$!
wait "$node"
code=$?
pkill -P "$reader" 2>/dev/null  # its sleep
kill "$reader" 2>/dev/null
exit "$code"

{## Template of `megatrain launch torchrun` and of what `megatrain launch ssh` runs on every host. ##}
# {{ name }}: the same on every node; NODE_RANK says which of them this is, from 0 ({{ master_addr }}) to {{ cluster_nodes - 1 }}.
cd {{ directory|q }} || exit 1
{% for line in cluster.setup %}
{{ line }}
{% endfor %}
{% if cluster_nodes > 1 %}
# The interface that has the first node's address, or leads there. gloo, and NCCL where it connects and without InfiniBand,
# would take the first interface, which may be a container's bridge.
{% if cluster.interface is none %}
master=$(getent ahostsv4 {{ master_addr|q }} | awk '{print $1; exit}')
case $master in
  "" | 127.*)
    echo "launch: {{ master_addr }} is '$master' on $(hostname), which the other nodes can't reach; give the first node's address" >&2
    exit 1 ;;
esac
interface=$(ip -o -4 addr show to "$master" | awk '{print $2; exit}')
[ -n "$interface" ] || interface=$(ip -o route get "$master" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
{% else %}
interface={{ cluster.interface|q }}
{% endif %}
export GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
{% endif %}
export MEGATRAIN_EXPECT_WORLD={{ cluster.world_size }}  # each process refuses to train among fewer
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / {{ cluster.processes }} > 0 ? $(nproc) / {{ cluster.processes }} : 1))}  # the cores of a node, shared
export PYTHONUNBUFFERED=1  # the last lines before a crash reach the log
export PYTHONFAULTHANDLER=1  # a crash in native code leaves the Python stack
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={{ grace_s }}  # torchrun kills what has not saved 30 s after SIGTERM otherwise
{% if cluster.gpus_per_node %}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}  # the reason of a failure, and nothing else
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}  # remember the last collectives ...
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # ... and write them down when one does not end
{% endif %}
{% for each in cluster.env %}
export {{ each.split("=")[0] }}={{ each.split("=", 1)[1]|q }}
{% endfor %}
# Static rendezvous: the default one compares the clocks of different hosts, and may split the job where they differ. No
# restarts by torchrun: a restart resumes on all nodes, from a checkpoint.
exec {{ python|q }} -m torch.distributed.run --nnodes={{ cluster_nodes }} --nproc-per-node={{ cluster.processes }} \
  --node-rank="$NODE_RANK" --master-addr={{ master_addr|q }} --master-port={{ cluster.master_port }} --max-restarts=0 \
  -m megatrain train{% for word in overrides %} \
  {{ word|q }}{% endfor %}


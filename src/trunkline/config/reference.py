"""Flags of the reference interface that Trunkline knows but does not have: refused by name, with a reason.

`ALWAYS_SO` are those that ask for what already holds, so that launch commands written for SGLang keep
working: each with the values that may be given ("" for a switch) and the fact. Other values are refused.
"""

from __future__ import annotations

from collections.abc import Mapping

_ONE = ("1",)
_NO_GRAPHS = "CUDA graphs are not used"
_ONE_DEVICE = "one device computes the model"

# flag -> (accepted values; "" means that the flag takes none), what holds
ALWAYS_SO: Mapping[str, tuple[tuple[str, ...], str]] = {
    "--enable-metrics": (("",), "/metrics is always served"),
    "--enable-streaming-session": (("",), "sessions may always be opened with streaming true"),
    "--enable-cache-report": (("",), "usage always reports cached tokens"),
    "--enable-deterministic-inference": (("",), "results never depend on the batch, the chunks or the cache"),
    "--enable-response-store": (("",), "responses are stored unless --response-store-size is 0"),
    "--is-embedding": (("",), "every model serves embeddings, beside text"),
    "--skip-server-warmup": (("",), "no warm-up request is sent"),
    "--disable-cuda-graph": (("",), _NO_GRAPHS),
    "--disable-prefill-cuda-graph": (("",), _NO_GRAPHS),
    "--disable-decode-cuda-graph": (("",), _NO_GRAPHS),
    "--disable-custom-all-reduce": (("",), _ONE_DEVICE),
    "--tokenizer-mode": (("auto",), "tokenizer.json is read by the fast tokenizer"),
    "--tokenizer-backend": (("huggingface",), "tokenizer.json is read by the fast tokenizer"),
    "--load-format": (("auto", "safetensors"), "weights are read from safetensors files"),
    "--model-impl": (("auto",), "models are Trunkline's own"),
    "--disaggregation-mode": (("null",), "one instance computes prompts and outputs"),
    "--radix-eviction-policy": (("lru",), "the least recently used pages leave first"),
    "--moe-a2a-backend": (("none",), _ONE_DEVICE),
    "--stream-interval": (_ONE, "every token is sent as it comes"),
    "--detokenizer-worker-num": (_ONE, "API processes detokenise (--tokenizer-worker-num)"),
    "--num-continuous-decode-steps": (_ONE, "every step may admit requests"),
    "--scheduler-recv-interval": (_ONE, "messages are read before every step"),
    "--tp-size": (_ONE, _ONE_DEVICE),
    "--pp-size": (_ONE, _ONE_DEVICE),
    "--dp-size": (_ONE, _ONE_DEVICE),
    "--ep-size": (_ONE, _ONE_DEVICE),
    "--attn-dp-size": (_ONE, _ONE_DEVICE),
    "--attn-cp-size": (_ONE, _ONE_DEVICE),
    "--dcp-size": (_ONE, _ONE_DEVICE),
    "--moe-dp-size": (_ONE, _ONE_DEVICE),
    "--nnodes": (_ONE, _ONE_DEVICE),
    "--node-rank": (("0",), _ONE_DEVICE),
    "--base-gpu-id": (("0",), "the first visible GPU is used"),
    "--cpu-offload-gb": (("0",), "weights stay on the device"),
}

# flag of the table -> the reference's values that it does not take, why
REFUSED_VALUES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "--kv-cache-dtype": (
        ("fp8_e5m2", "fp8_e4m3", "mxfp8", "nvfp4", "fp4_e2m1", "fp4_mx_block16"),
        "no kernel reads keys and values in 8 or 4 bit floating point; int8 takes as much memory as fp8",
    ),
}

# other spelling -> the one used in the tables
SAME_FLAG: Mapping[str, str] = {
    "--tp": "--tp-size",
    "--tensor-parallel-size": "--tp-size",
    "--pp": "--pp-size",
    "--pipeline-parallel-size": "--pp-size",
    "--dp": "--dp-size",
    "--data-parallel-size": "--dp-size",
    "--ep": "--ep-size",
    "--expert-parallel-size": "--ep-size",
    "--attention-data-parallel-size": "--attn-dp-size",
    "--attention-context-parallel-size": "--attn-cp-size",
    "--decode-context-parallel-size": "--dcp-size",
    "--moe-data-parallel-size": "--moe-dp-size",
    "--enable-hicache": "--enable-hierarchical-cache",
    "--speculative-draft-model": "--speculative-draft-model-path",
    "--nccl-init-addr": "--dist-init-addr",
    "--grpc-http-sidecar-port": "--smg-http-sidecar-port",
    "--hierarchical-sparse-attention-extra-config": "--hisparse-config",
    "--context-bucket": "--cuda-graph-prefill-max-context",
}

# why -> the flags it holds for, in one string
_REFUSED: Mapping[str, str] = {
    "never: no code from a model folder is run. Drop the flag; a known architecture needs none": """
        --trust-remote-code""",
    "a YAML file of flags is not built yet; give the flags on the command line": "--config",
    "use --max-total-tokens or --kv-memory to size the KV pool": """
        --swa-full-tokens-ratio --disable-hybrid-swa-memory --max-mamba-cache-size
        --mamba-full-memory-ratio --hybrid-kvcache-ratio --swa-prefix-tails --c128-page-size""",
    "removed from the reference; Trunkline has no such mechanism": """
        --cuda-graph-max-bs --cuda-graph-bs --torchao-config --enable-double-sparsity
        --ds-channel-config-path --ds-heavy-channel-num --ds-heavy-token-num --ds-heavy-channel-type
        --ds-sparse-decode-threshold --piecewise-cuda-graph-max-tokens --piecewise-cuda-graph-tokens
        --piecewise-cuda-graph-compiler --enable-piecewise-cuda-graph --nsa-prefill-backend
        --nsa-decode-backend --enable-nsa-prefill-context-parallel --disaggregation-decode-tp
        --disaggregation-decode-dp --disaggregation-prefill-pp --prefill-round-robin-balance
        --enable-nan-detection --enable-flashinfer-autotune --multi-item-scoring-delimiter
        --load-watch-interval --keep-mm-feature-on-device --mm-max-concurrent-calls
        --mm-per-request-timeout --collect-tokens-histogram --enable-expert-distribution-metrics
        --speculative-ngram-branch-length --speculative-ngram-min-match-window-size
        --speculative-ngram-max-match-window-size --enable-ep-moe --enable-deepep-moe
        --enable-flashinfer-cutlass-moe --enable-flashinfer-trtllm-moe --pdlb-url --max-micro-batch-size
        --enable-dp-attention""",
    "streams always carry only the new text on the OpenAI routes; the other form is not built yet": """
        --incremental-streaming-output --stream-output --stream-response-default-include-usage
        --batch-notify-size""",
    "more than one device or process is not built yet": """
        --nccl-port --dist-timeout --dist-init-addr --gated-launch-port --pp-max-micro-batch-size
        --pp-async-batch-depth --load-balance-method --dwdp-size --dcp-comm-backend
        --dcp-replicate-q-proj --enable-prefill-cp --cp-strategy --enable-dsa-cache-layer-split
        --enable-cp-decode-attn-tp --enable-kv-cache-sharding
        --enable-dp-attention-local-control-broadcast --enable-dp-lm-head --enable-tp-lm-head-all-to-all
        --enable-attn-tp-input-scattered --enable-shared-experts-attn-tp --shared-experts-tp-size
        --enable-dense-mlp-attn-tp --enable-layernorm-sp --enable-megamoe-for-layernorm-sp
        --disable-attn-tp-gather --enable-p2p-check --moe-dense-tp-size --elastic-ep-join-rank-offset
        --elastic-ep-initial-size --max-ep-size --gpu-id-step --use-ray --numa-node --enable-nccl-nvls
        --enable-symm-mem --enable-mscclpp --enable-torch-symm-mem --enable-scattered-sconv
        --pre-warm-nccl --boundary-reduction --enable-quant-communications
        --enforce-disable-flashinfer-allreduce-fusion --flashinfer-allreduce-fusion-backend
        --enable-aiter-allreduce-fusion --disable-aiter-allreduce-fusion-in-prefill
        --disable-aiter-allreduce-fusion-in-decode""",
    "mixture-of-experts models are not built yet": """
        --enable-fused-moe-sum-all-reduce --enable-w4a4-mxfp4-megamoe --deepep-v2-mode
        --moe-runner-backend --flashinfer-mxfp4-moe-precision --deepep-mode --fuseep-mode
        --deepep-dispatcher-output-dtype --flashinfer-a2a-dispatch-type --ep-num-redundant-experts
        --ep-dispatch-algorithm --init-expert-location --enable-eplb --eplb-algorithm
        --eplb-rebalance-num-iterations --eplb-rebalance-layers-per-chunk
        --eplb-min-rebalancing-utilization-threshold --expert-distribution-recorder-mode
        --expert-distribution-recorder-buffer-size --expert-balancedness-report-mode --deepep-config
        --elastic-ep-backend --enable-elastic-expert-backup --mooncake-ib-device --enable-waterfill
        --elastic-ep-join-mode --elastic-ep-scale-timeout --disable-flashinfer-cutlass-moe-fp4-allgather
        --disable-shared-experts-fusion --enforce-shared-experts-fusion --enable-paged-experts
        --paged-experts-num-resident --kt-weight-path --kt-method --kt-cpuinfer --kt-threadpool-count
        --kt-num-gpu-experts --kt-max-deferred-experts-per-token --enable-two-batch-overlap
        --enable-single-batch-overlap --tbo-token-distribution-threshold --enable-return-routed-experts
        --experts-shared-outer-loras""",
    "quantised weights or KV are not built yet": """
        --quantization-param-path --modelopt-quant --modelopt-checkpoint-restore-path
        --modelopt-checkpoint-save-path --modelopt-export-path --quantize-and-serve --rl-quant-profile
        --fp8-gemm-backend --fp4-gemm-backend --prefill-kv-cache-dequant-dtype --qsa-indexer-dtype""",
    "speculative decoding is not built yet": """
        --speculative-algorithm --uno-lora-path --speculative-draft-model-path
        --speculative-draft-model-revision --speculative-draft-load-format --speculative-num-steps
        --speculative-eagle-topk --speculative-num-draft-tokens --speculative-dflash-block-size
        --speculative-domino-candidate-pool-size --speculative-dspark-block-size
        --speculative-dspark-sps-table-path --speculative-dspark-confidence-sts-path
        --speculative-dspark-align-verify-tokens-to-graph-tier --speculative-accept-threshold-single
        --speculative-accept-threshold-acc --speculative-use-rejection-sampling
        --speculative-use-block-verification --speculative-token-map --speculative-attention-mode
        --speculative-draft-attention-backend --speculative-dsa-topk-backend
        --speculative-draft-kv-cache-dtype --speculative-draft-window-size --speculative-draft-sink-size
        --speculative-moe-runner-backend --speculative-moe-a2a-backend
        --speculative-enable-w4a4-mxfp4-megamoe --speculative-draft-model-quantization
        --enable-multi-layer-eagle --speculative-adaptive --speculative-adaptive-config --spec-trace-dir
        --speculative-ngram-min-bfs-breadth --speculative-ngram-max-bfs-breadth
        --speculative-ngram-match-type --speculative-ngram-max-trie-depth --speculative-ngram-capacity
        --speculative-ngram-external-corpus-path --speculative-ngram-external-sam-budget
        --speculative-ngram-external-corpus-max-tokens --decoupled-spec-bind-endpoint
        --decoupled-spec-connect-endpoints --decoupled-spec-rank --decoupled-spec-role
        --enable-draft-weights-cpu-backup --decrypted-draft-config-file""",
    "LoRA adapters are not built yet": """
        --enable-lora --enable-lora-overlap-loading --max-lora-rank --lora-target-modules --lora-paths
        --max-loaded-loras --max-loras-per-batch --lora-eviction-policy --lora-backend
        --max-lora-chunk-size --lora-use-virtual-experts --lora-strict-loading
        --lora-drain-wait-threshold""",
    "prefill/decode disaggregation is not built yet": """
        --disaggregation-decode-allocation-policy --disaggregation-transfer-backend
        --disaggregation-enable-kv-checksum --disaggregation-bootstrap-port --disaggregation-ib-device
        --disaggregation-decode-enable-radix-cache --disaggregation-decode-enable-offload-kvcache
        --disaggregation-decode-retraction-backup --num-reserved-decode-tokens
        --disaggregation-decode-extra-slots --disaggregation-decode-polling-interval
        --enable-pd-role-switch --optimistic-prefill-attempts --enable-pdmux --pdmux-config-path
        --sm-group-num --disaggregation-decode-host-receive-threshold --prefill-only-disable-kv-cache""",
    "host and disk tiers of the prefix cache, and other cache back ends, are not built yet": """
        --radix-eviction-policy-config --enable-page-major-kv-layout --enable-unified-memory
        --enable-session-radix-cache --radix-cache-backend --enable-hierarchical-cache
        --hicache-host-memory-mode --hicache-ratio --hicache-size --hicache-host-memory-fraction
        --hicache-write-policy --hicache-io-backend --hicache-mem-layout --hicache-storage-backend
        --hicache-storage-prefetch-policy --hicache-storage-backend-extra-config
        --hicache-storage-prefetch-retry-poll-interval --hicache-storage-prefetch-retry-max-attempts
        --enable-unified-cache-external-linker --unified-cache-external-linker-backend
        --unified-cache-external-linker-config --enable-linker-mla-dedup --enable-hisparse
        --hisparse-config --enable-lmcache --lmcache-config-file --enable-flexkv --flexkv-config-file
        --kv-events-config""",
    "images, audio and video are not built yet": """
        --enable-multimodal --mm-attention-backend --enable-broadcast-mm-inputs-process
        --enable-prefix-mm-cache --mm-enable-dp-encoder --mm-process-config --mm-processor-worker-num
        --mm-io-worker-num --allowed-media-domains --media-url-max-file-size-mb
        --mm-preprocess-cache-size-mb --trust-mm-content-hashes --limit-mm-data-per-request
        --enable-mm-global-cache --image-processor-backend --mm-global-cache-backend
        --disable-fast-image-processor --mm-feature-transport --encoder-only --language-only
        --language-model-only --encoder-transfer-backend --encoder-urls --encoder-bootstrap-port
        --encoder-register-urls --enable-adaptive-dispatch-to-encoder --asr-max-buffer-seconds
        --asr-max-concurrent-sessions --enable-precise-embedding-interpolation""",
    "structured output is not built yet": """
        --constrained-json-whitespace-pattern --constrained-json-disable-any-whitespace
        --constrained-json-max-whitespace-cnt --disable-outlines-disk-cache""",
    "thinking is bounded by max_thinking_tokens, and templates are given values by each request": """
        --tool-server --default-chat-template-kwargs --strip-thinking-cache --enable-strict-thinking""",
    "there is one implementation of each operation for each device; choosing a kernel is not built yet": """
        --attention-backend --decode-attention-backend --prefill-attention-backend --sampling-backend
        --enable-lean-attention --enable-nvidia-megakernel --enable-amd-monokernel --bf16-gemm-backend
        --dsa-prefill-backend --dsv4-prefill-backend --dsa-triton-union --dsa-decode-backend
        --dsv4-attn-backend --dsa-paged-mqa-logits-backend --dsa-topk-backend
        --disable-flashinfer-autotune --flashinfer-autotune-skip-ops --triton-attention-reduce-in-fp32
        --triton-attention-num-kv-splits --triton-attention-split-tile-size
        --flashinfer-mla-disable-ragged --enable-fused-qk-norm-rope --enable-deepseek-v4-fp4-indexer
        --enable-dsa-fused-indexer --mamba-backend --mamba-ssm-dtype --mamba-max-states-per-path
        --enable-mamba-cache-stochastic-rounding --mamba-cache-philox-rounds --mamba-radix-cache-strategy
        --mamba-track-interval --enable-int8-mamba-checkpoint --int8-mamba-ckpt-size
        --linear-attn-backend --linear-attn-decode-backend --linear-attn-prefill-backend
        --linear-attn-verify-backend --enable-linear-replayssm --linear-replayssm-cache-len
        --enable-linear-replayssm-spec --enable-fp32-lm-head --enable-tf32-matmul --mlx-enable-sampling
        --disable-chunked-prefix-cache --enable-encoder-swa-bounded-replay
        --enable-decoder-swa-bounded-replay""",
    "CUDA graphs and torch.compile are not built yet": """
        --cuda-graph-config --cuda-graph-backend-decode --cuda-graph-backend-prefill
        --cuda-graph-max-bs-decode --cuda-graph-max-bs-prefill --cuda-graph-max-seq-len-prefill
        --cuda-graph-bs-decode --cuda-graph-bs-prefill --cuda-graph-prefill-max-context
        --disable-cuda-graph-padding --enable-profile-cuda-graph --enable-cudagraph-gc --debug-cuda-graph
        --enable-torch-compile --enable-torch-compile-debug-mode --torch-compile-max-bs""",
    "offloading weights, weight updates and memory release are not built yet": """
        --enable-memory-saver --enable-weights-cpu-backup --offload-group-size --offload-num-in-group
        --offload-prefetch-step --offload-mode --ple-offload-embedding --ple-offload-backend
        --ple-offload-dir --rl-on-policy-target --startup-weight-load-mode --custom-weight-loader
        --weight-loader-disable-mmap --weight-loader-prefetch-checkpoints
        --weight-loader-prefetch-num-threads --weight-loader-drop-cache-after-load
        --remote-instance-weight-loader-seed-instance-ip
        --remote-instance-weight-loader-seed-instance-service-port
        --remote-instance-weight-loader-send-weights-group-ports --remote-instance-weight-loader-backend
        --remote-instance-weight-loader-start-seed-via-transfer-engine --engine-info-bootstrap-port
        --modelexpress-config --delete-ckpt-after-loading --checkpoint-engine-wait-weights-before-ready
        --weight-cache-mode --weight-cache-socket --weight-cache-timeout --model-loader-extra-config""",
    "the model is described by its config.json alone": """
        --model-config-parser --json-model-override-args --decrypted-config-file
        --model-checksum --dllm-algorithm --dllm-algorithm-config --dllm-fdfo""",
    "set HF_HOME in the environment to choose where hub downloads are kept": "--download-dir",
    "returning more than tokens and log-probabilities is not built yet": """
        --enable-return-hidden-states --return-hidden-states-mode --enable-return-aux-hidden-states
        --return-aux-hidden-state-layer-ids --enable-return-indexer-topk --sampling-mask-max-tokens
        --enable-mis --return-input-ids --return-output-ids""",
    "never: it would run code sent by a client": "--enable-custom-logit-processor",
    "watermarking is not built yet": "--enable-watermark --watermark-config",
    "this scheduling knob is not built yet": """
        --prefill-decode-interval --prefill-decode-interval-min-bs --enable-dynamic-chunking
        --prefill-max-requests
        --retraction-policy --enable-prefill-delayer
        --prefill-delayer-max-delay-passes --prefill-delayer-token-usage-low-watermark
        --prefill-delayer-forward-passes-buckets --prefill-delayer-wait-seconds-buckets
        --prefill-delayer-queue-min-ratio --prefill-delayer-max-delay-ms --min-free-slots-delay
        --sleep-on-idle""",
    "put a reverse proxy in front for HTTP/2; not built yet": """
        --enable-http2 --http2-max-concurrent-streams --http2-initial-connection-window-size""",
    "restart the server to read a new certificate; not built yet": "--enable-ssl-refresh",
    "all processes accept from one socket, so none is lost when one ends": "--enable-http-worker-reuseport",
    "gRPC is not built yet": """
        --smg-grpc-mode --grpc-mode --grpc-port --grpc-response-timeout-secs --sidecar --sidecar-args
        --smg-http-sidecar-port""",
    "give the template as a file with --chat-template": """
        --hf-chat-template-name --completion-template --trust-request-chat-template""",
    "a prompt longer than the context is always refused, never cut": "--allow-auto-truncate",
    "put sampling defaults in the model's generation_config.json": "--preferred-sampling-params",
    "the text layer has no such knob": """
        --skip-tokenizer-init --enable-dynamic-batch-tokenizer --dynamic-batch-tokenizer-batch-size
        --dynamic-batch-tokenizer-batch-timeout --enable-tokenizer-batch-encode
        --disable-tokenizer-batch-decode --warmups""",
    "this form of logging, tracing or debugging is not built yet; see /metrics and --log-level": """
        --log-level-http --log-requests-target
        --uvicorn-access-log-exclude-prefixes --show-time-cost --enable-mfu-metrics
        --enable-metrics-for-all-schedulers --load-snapshot-publish-interval
        --tokenizer-metrics-custom-labels-header --tokenizer-metrics-allowed-custom-labels
        --extra-metric-labels
        --prompt-tokens-buckets --generation-tokens-buckets
        --gc-warning-threshold-secs --decode-log-interval --enable-request-time-stats-logging
        --load-publish-endpoint --enable-forward-pass-metrics --forward-pass-metrics-worker-id
        --forward-pass-metrics-ipc-name --trace-modules
        --otlp-service-name --export-metrics-to-file --export-metrics-to-file-dir --stat-loggers
        --kv-canary --kv-canary-real-data --kv-canary-sweep-interval --debug-tensor-dump-output-folder
        --debug-tensor-dump-layers --debug-tensor-dump-input-file --forward-hooks --msprobe-dump-config
        --enable-layerwise-nvtx-marker --soft-watchdog-timeout --custom-sigquit-handler --gc-threshold""",
}


def refused_flags() -> dict[str, str]:
    """Every known flag that is not built: flag -> why, and what to do."""
    return {name: why for why, names in _REFUSED.items() for name in names.split()}

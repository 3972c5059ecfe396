# Qwen3-30B-A3B, and its Base, -Instruct-2507 and -Thinking-2507 (whose RoPE base is 10000000)
MODEL_ARGS=(
   --swiglu
   --num-layers 48
   --hidden-size 2048
   --ffn-hidden-size 6144
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 4
   --kv-channels 128
   --vocab-size 151936
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --disable-bias-linear
   --qk-layernorm
   --untie-embeddings-and-output-weights
   --position-embedding-type rope
   --rotary-base 1000000
   --no-rope-fusion
   --num-experts 128
   --moe-ffn-hidden-size 768
   --moe-router-topk 8
   --moe-grouped-gemm
)

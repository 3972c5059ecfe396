# Qwen3-4B; for Qwen3-4B-Instruct-2507 add: MODEL_ARGS+=( --rotary-base 5000000 )
MODEL_ARGS=(
   --swiglu
   --num-layers 36
   --hidden-size 2560
   --ffn-hidden-size 9728
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 151936
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --disable-bias-linear
   --qk-layernorm
   --position-embedding-type rope
   --rotary-base 1000000
   --no-rope-fusion
)

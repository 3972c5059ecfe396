# Qwen3-0.6B
MODEL_ARGS=(
   --swiglu
   --num-layers 28
   --hidden-size 1024
   --ffn-hidden-size 3072
   --num-attention-heads 16
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

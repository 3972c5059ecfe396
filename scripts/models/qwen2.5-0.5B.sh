# Qwen2.5-0.5B and -0.5B-Instruct
MODEL_ARGS=(
   --swiglu
   --num-layers 24
   --hidden-size 896
   --ffn-hidden-size 4864
   --num-attention-heads 14
   --group-query-attention
   --num-query-groups 2
   --kv-channels 64
   --vocab-size 151936
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --disable-bias-linear
   --add-qkv-bias
   --position-embedding-type rope
   --rotary-base 1000000
   --no-rope-fusion
)

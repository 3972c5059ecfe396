# Qwen2.5-1.5B and -1.5B-Instruct
MODEL_ARGS=(
   --swiglu
   --num-layers 28
   --hidden-size 1536
   --ffn-hidden-size 8960
   --num-attention-heads 12
   --group-query-attention
   --num-query-groups 2
   --kv-channels 128
   --vocab-size 151936
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --disable-bias-linear
   --add-qkv-bias
   --position-embedding-type rope
   --rotary-base 1000000
   --no-rope-fusion
)

# Qwen2.5-3B and -3B-Instruct
MODEL_ARGS=(
   --swiglu
   --num-layers 36
   --hidden-size 2048
   --ffn-hidden-size 11008
   --num-attention-heads 16
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

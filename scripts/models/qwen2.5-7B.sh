# Qwen2.5-7B and -7B-Instruct
MODEL_ARGS=(
   --swiglu
   --num-layers 28
   --hidden-size 3584
   --ffn-hidden-size 18944
   --num-attention-heads 28
   --group-query-attention
   --num-query-groups 4
   --kv-channels 128
   --vocab-size 152064
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --disable-bias-linear
   --add-qkv-bias
   --untie-embeddings-and-output-weights
   --position-embedding-type rope
   --rotary-base 1000000
   --no-rope-fusion
)

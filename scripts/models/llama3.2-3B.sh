# Llama-3.2-3B and -3B-Instruct
MODEL_ARGS=(
   --swiglu
   --num-layers 28
   --hidden-size 3072
   --ffn-hidden-size 8192
   --num-attention-heads 24
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 128256
   --max-position-embeddings 131072
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --disable-bias-linear
   --position-embedding-type rope
   --rotary-base 500000
   --use-rope-scaling
   --rotary-scaling-factor 32
   --no-rope-fusion
)

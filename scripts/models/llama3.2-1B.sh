# Llama-3.2-1B and -1B-Instruct
MODEL_ARGS=(
   --swiglu
   --num-layers 16
   --hidden-size 2048
   --ffn-hidden-size 8192
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 8
   --kv-channels 64
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

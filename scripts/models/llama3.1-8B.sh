# Llama-3.1-8B and -8B-Instruct
MODEL_ARGS=(
   --swiglu
   --num-layers 32
   --hidden-size 4096
   --ffn-hidden-size 14336
   --num-attention-heads 32
   --group-query-attention
   --num-query-groups 8
   --kv-channels 128
   --vocab-size 128256
   --max-position-embeddings 131072
   --normalization RMSNorm
   --norm-epsilon 1e-5
   --disable-bias-linear
   --untie-embeddings-and-output-weights
   --position-embedding-type rope
   --rotary-base 500000
   --use-rope-scaling
   --rotary-scaling-factor 8
   --no-rope-fusion
)

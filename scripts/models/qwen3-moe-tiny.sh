# A small Qwen3-MoE for the demo's task: the family's every trait, at a size for two CPU cores
MODEL_ARGS=(
   --swiglu
   --num-layers 4
   --hidden-size 128
   --ffn-hidden-size 512
   --num-attention-heads 4
   --group-query-attention
   --num-query-groups 2
   --kv-channels 64
   --vocab-size 128
   --normalization RMSNorm
   --norm-epsilon 1e-6
   --disable-bias-linear
   --qk-layernorm
   --untie-embeddings-and-output-weights
   --position-embedding-type rope
   --rotary-base 10000
   --no-rope-fusion
   --num-experts 8
   --moe-ffn-hidden-size 64
   --moe-router-topk 2
)

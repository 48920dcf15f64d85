/* What ExpertRowsBranch, GappedExpertRowsBranch and ExpertRowsBranchNorm and SwiGLU are called
 * with: read, and every dimension checked. */
#include "runtime.h"

OrtStatus *lime_edge_read_operands(const Kernel *kernel, const OrtKernelContext *context, Operands *operands) {
    Tensor x, y, a, b;
    Parts *parts = &operands->parts;
    TRY(read_real(context, 0, &x));
    TRY(read_real(context, 1, &y));
    TRY(read_tensor(context, 2, &a));
    TRY(read_tensor(context, 3, &b));
    *parts = kernel->parts;
    if (y.count != 3 || y.dimensions[2] != parts->width)
        return refuse("lime_edge: y (B, S, N) does not fit the attribute widths");
    if (a.count != 2 || b.count != 2 || a.dimensions[1] != b.dimensions[0] || b.dimensions[1] != parts->width)
        return refuse("lime_edge: a (K, R) and b (R, N) do not fit each other or the attribute widths");
    if (a.type != b.type || (a.type != ORT_FLOAT && a.type != ORT_FLOAT16))
        return refuse("lime_edge: a and b must both be float32 or both be float16");
    int64_t rank = 0;
    for (int64_t i = 0; i < parts->count; i++) rank += parts->ranks[i];
    parts->inputs = a.dimensions[0];
    parts->rank = a.dimensions[1];
    if (parts->rank % 8 || parts->rank > MOST_RANK || rank > parts->rank)
        return refuse("lime_edge: the rank of a must be a multiple of 8, at most 1024, and hold the attribute ranks");
    if (!is_batch(&x, y.dimensions[0], y.dimensions[1], parts->inputs))
        return refuse("lime_edge: x (B, S, K) and y (B, S, N) do not fit a (K, R) and b (R, N)");
    for (int i = 0; i < 3; i++) operands->dimensions[i] = y.dimensions[i];
    operands->rows = y.dimensions[0] * y.dimensions[1];
    operands->x = x.data;
    operands->y = y.data;
    operands->a = a.data;
    operands->b = b.data;
    operands->half = a.type == ORT_FLOAT16;
    return NULL;
}

OrtStatus *lime_edge_read_expert(const OrtKernelContext *context, Branch *branch) {
    Tensor expert;
    const Parts *parts = &branch->operands.parts;
    const int64_t batch = branch->operands.dimensions[0];
    TRY(read_real(context, 4, &expert));
    if (expert.count != 3 || expert.dimensions[1] != 1 || (expert.dimensions[0] != 1 && expert.dimensions[0] != batch))
        return refuse("lime_edge: the expert must have one row, or one for each row of y: (1 or B, 1, sum_H)");
    for (int64_t i = 0; i < parts->count; i++)
        if (parts->ranks[i] && parts->offsets[i] > expert.dimensions[2] - parts->widths[i])
            return refuse("lime_edge: the expert is shorter than the attribute offsets say");
    branch->expert = expert.data;
    branch->expert_step = expert.dimensions[0] == 1 ? 0 : expert.dimensions[2];
    return NULL;
}

OrtStatus *lime_edge_read_norm(const Kernel *kernel, const OrtKernelContext *context, Branch *branch) {
    Tensor stream, gain;
    const int64_t *dimensions = branch->operands.dimensions;
    TRY(read_real(context, 5, &stream));
    TRY(read_real(context, 6, &gain));
    if (!is_batch(&stream, dimensions[0], dimensions[1], dimensions[2]) || !is_vector(&gain, dimensions[2]))
        return refuse("lime_edge: stream (B, S, N) and gain (N,) do not fit y (B, S, N)");
    branch->stream = stream.data;
    branch->gain = gain.data;
    branch->epsilon = kernel->epsilon;
    return NULL;
}

OrtStatus *lime_edge_read_gate(OrtKernelContext *context, Gate *gate) {
    Tensor x;
    int64_t dimensions[MOST_DIMENSIONS];
    TRY(read_real(context, 0, &x));
    const size_t last = x.count - 1;
    gate->rows = 1;
    for (size_t i = 0; i < last; i++) gate->rows *= dimensions[i] = x.dimensions[i];
    if (x.dimensions[last] % 2) return refuse("lime_edge: SwiGLU halves its input's last dimension, which is odd");
    gate->x = x.data;
    gate->width = dimensions[last] = x.dimensions[last] / 2;
    return make_output(context, 0, dimensions, x.count, &gate->out);
}

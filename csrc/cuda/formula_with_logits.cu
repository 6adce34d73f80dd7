#include "stream_launcher.cuh"

template int64_t bce_ext::cuda::launch_pass<bce_ext::WithLogits>(const bce_ext::Problem&, double*, int64_t,
                                                                 const bce_ext::cuda::StreamLauncher&);

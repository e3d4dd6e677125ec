#include "runner.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/core/exec_aten/exec_aten.h>
#include <executorch/runtime/core/hierarchical_allocator.h>
#include <executorch/runtime/executor/memory_manager.h>
#include <executorch/runtime/executor/method.h>
#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

// The wheel ships libexecutorch_threadpool.so but not its header. These are the members used here, as ExecuTorch
// 1.5 exports them; a wheel whose symbols differ fails at link time, not at run time.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t new_thread_count);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

namespace et = executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;
using executorch::extension::MallocMemoryAllocator;
using executorch::extension::MmapDataLoader;
using executorch::extension::threadpool::get_threadpool;

constexpr size_t kAlignment = 64;
constexpr size_t kMaxLoggedBytes = 4000;

// XNNPACK's name and option as its backend registers them (XNNPACKBackend.h, which the wheel leaves out).
// 2 is "global": the delegates of all programs run one after another, so one workspace serves them all.
constexpr char kXnnpack[] = "XnnpackBackend";
constexpr char kWorkspaceSharing[] = "workspace_sharing_mode";
constexpr int kWorkspaceGlobal = 2;

thread_local std::string last_error;
thread_local std::string* logged = nullptr;

std::mutex process_mutex;
size_t open_programs = 0;

// What the runtime logs while one of our calls is under way becomes part of that call's error text; anything else
// in the process keeps ExecuTorch's habit of writing to stderr.
void emit_log(et_timestamp_t, et_pal_log_level_t level, const char* file, const char*, size_t line,
              const char* message, size_t length) {
  const bool grave = level == kError || level == kFatal;
  if (logged == nullptr || level == kFatal) {
    fprintf(stderr, "%c executorch %s:%zu] %.*s\n", static_cast<char>(level), file, line, static_cast<int>(length),
            message);
  } else if (grave && logged->size() < kMaxLoggedBytes) {
    logged->append(logged->empty() ? "" : "; ").append(message, length);
  }
}

void start_runtime() {
  static std::once_flag once;
  std::call_once(once, [] {
    et::register_pal(et::PalImpl::create(emit_log, __FILE__));
    et::runtime_init();
    et::BackendOptions<1> options;
    (void)options.set_option(kWorkspaceSharing, kWorkspaceGlobal);
    // A wheel without XNNPACK still runs programs that do not ask for it.
    (void)et::set_option(kXnnpack, options.view());
  });
}

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

void check(et::Error error, const std::string& what) {
  if (error != et::Error::Ok) fail(what + ": " + (et::to_string(error) + strlen("Error::")));
}

template <typename T>
T take(et::Result<T> result, const std::string& what) {
  check(result.error(), what);
  return std::move(result.get());
}

// Runs `body`, which may throw, and gives `failed` with edgestill_error() set if it does: nothing is thrown into C.
template <typename Body, typename Value>
Value guarded(Value failed, Body body) noexcept {
  std::string log;
  logged = &log;
  try {
    start_runtime();
    Value value = body();
    logged = nullptr;
    return value;
  } catch (const std::exception& exception) {
    logged = nullptr;
    try {
      last_error = exception.what();
      if (!log.empty()) last_error += " (" + log + ")";
    } catch (const std::bad_alloc&) {
      last_error.clear();
    }
    return failed;
  }
}

struct FreeAligned {
  void operator()(uint8_t* bytes) const { std::free(bytes); }
};
using AlignedBytes = std::unique_ptr<uint8_t, FreeAligned>;

AlignedBytes allocate(size_t size) {
  const size_t rounded = (size + kAlignment) / kAlignment * kAlignment;
  void* bytes = nullptr;
  if (posix_memalign(&bytes, kAlignment, rounded) != 0) throw std::bad_alloc();
  return AlignedBytes(static_cast<uint8_t*>(bytes));
}

// One more open program as long as it lives; from its construction on a delegate may hold the thread pool.
struct OpenCount {
  OpenCount() {
    std::lock_guard<std::mutex> lock(process_mutex);
    ++open_programs;
  }
  ~OpenCount() {
    std::lock_guard<std::mutex> lock(process_mutex);
    --open_programs;
  }
  OpenCount(const OpenCount&) = delete;
};

std::string label(edgestill_side side, size_t index) {
  return (side == EDGESTILL_INPUT ? "input " : "output ") + std::to_string(index);
}

edgestill_tensor describe(const et::TensorInfo& info, const std::string& what) {
  edgestill_tensor tensor{};
  tensor.dtype = static_cast<int32_t>(info.scalar_type());
  if (tensor.dtype != EDGESTILL_UINT8 && tensor.dtype != EDGESTILL_INT64 && tensor.dtype != EDGESTILL_FLOAT32)
    fail(what + " has element type " + std::to_string(tensor.dtype) + ", not uint8, int64 or float32");
  const auto sizes = info.sizes();
  if (sizes.size() > EDGESTILL_MAX_RANK) fail(what + " has more than 8 dimensions");
  const auto order = info.dim_order();
  for (size_t i = 0; i < order.size(); ++i)
    if (order[i] != i) fail(what + " is not row-major");
  tensor.rank = static_cast<int32_t>(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) tensor.shape[i] = sizes[i];
  tensor.size_bytes = static_cast<int64_t>(info.nbytes());
  tensor.in_arena = info.is_memory_planned();
  return tensor;
}

// Whether an output is one of the inputs, passed through. It is the same value inside the method, so to point the
// output at a buffer would point the input there too, before it is read.
bool is_input(const et::Method& method, const et::EValue& output) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // nothing newer tells which value an input is
  for (size_t i = 0; i < method.inputs_size(); ++i)
    if (&method.get_input(i) == &output) return true;
#pragma GCC diagnostic pop
  return false;
}

// An input tensor whose data pointer changes from run to run. TensorImpl points into the vectors, so it never moves.
struct InputTensor {
  std::vector<TensorImpl::SizesType> sizes;
  std::vector<TensorImpl::DimOrderType> order;
  std::vector<TensorImpl::StridesType> strides;
  std::optional<TensorImpl> impl;

  explicit InputTensor(const edgestill_tensor& tensor) : sizes(tensor.shape, tensor.shape + tensor.rank) {
    order.resize(tensor.rank);
    strides.resize(tensor.rank);
    TensorImpl::StridesType stride = 1;
    for (int i = tensor.rank - 1; i >= 0; --i) {
      order[i] = static_cast<TensorImpl::DimOrderType>(i);
      strides[i] = stride;
      stride *= sizes[i];
    }
    impl.emplace(static_cast<ScalarType>(tensor.dtype), tensor.rank, sizes.data(), nullptr, order.data(),
                 strides.data());
  }
  InputTensor(const InputTensor&) = delete;
};

}  // namespace

// Members are destroyed in reverse: the method before the memory, program and file that it points into.
struct edgestill_program {
  OpenCount open_count;
  std::optional<MmapDataLoader> loader;
  std::optional<et::Program> program;
  MallocMemoryAllocator method_allocator;
  MallocMemoryAllocator temporary_allocator;
  std::vector<AlignedBytes> arenas;
  std::vector<et::Span<uint8_t>> arena_spans;
  std::optional<et::HierarchicalAllocator> planned;
  std::optional<et::MemoryManager> memory;
  std::optional<et::Method> method;
  std::vector<edgestill_tensor> tensors[2];
  std::vector<std::unique_ptr<InputTensor>> inputs;
  std::vector<bool> writes_to_caller;  // a run points output i at the caller's buffer
  int64_t arena_bytes = 0;

  edgestill_program(const char* path, const char* name);
  void run(const void* const* input_data, void* const* output_data);
};

edgestill_program::edgestill_program(const char* path, const char* name) {
  // Pages come from the file and can go back to it: no copy of the program in anonymous memory.
  loader.emplace(take(MmapDataLoader::from(path, MmapDataLoader::MlockConfig::NoMlock), "cannot open the file"));
  program.emplace(
      take(et::Program::load(&*loader, et::Program::Verification::InternalConsistency), "not a usable program"));
  const et::MethodMeta meta = take(program->method_meta(name), std::string("no method \"") + name + "\"");

  for (size_t i = 0; i < meta.num_inputs(); ++i) {
    const auto what = label(EDGESTILL_INPUT, i);
    tensors[EDGESTILL_INPUT].push_back(describe(take(meta.input_tensor_meta(i), what + " is not a tensor"), what));
    inputs.push_back(std::make_unique<InputTensor>(tensors[EDGESTILL_INPUT].back()));
  }
  for (size_t i = 0; i < meta.num_outputs(); ++i) {
    const auto what = label(EDGESTILL_OUTPUT, i);
    tensors[EDGESTILL_OUTPUT].push_back(describe(take(meta.output_tensor_meta(i), what + " is not a tensor"), what));
  }

  for (size_t i = 0; i < meta.num_memory_planned_buffers(); ++i) {
    const auto size = static_cast<size_t>(take(meta.memory_planned_buffer_size(i), "memory plan"));
    arena_bytes += static_cast<int64_t>(size);
    arenas.push_back(allocate(size));
    arena_spans.emplace_back(arenas.back().get(), size);
  }
  planned.emplace(et::Span<et::Span<uint8_t>>(arena_spans.data(), arena_spans.size()));
  memory.emplace(&method_allocator, &*planned, &temporary_allocator);

  method.emplace(take(program->load_method(name, &*memory), std::string("cannot load method \"") + name + "\""));

  for (size_t i = 0; i < tensors[EDGESTILL_OUTPUT].size(); ++i)
    writes_to_caller.push_back(!tensors[EDGESTILL_OUTPUT][i].in_arena && !is_input(*method, method->get_output(i)));
}

void edgestill_program::run(const void* const* input_data, void* const* output_data) {
  for (size_t i = 0; i < inputs.size(); ++i) {
    // The runtime only reads inputs, but its tensors know no const.
    inputs[i]->impl->set_data(const_cast<void*>(input_data[i]));
    check(method->set_input(et::EValue(Tensor(&*inputs[i]->impl)), i), label(EDGESTILL_INPUT, i));
  }
  const auto& outputs = tensors[EDGESTILL_OUTPUT];
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!writes_to_caller[i]) continue;
    check(method->set_output_data_ptr(output_data[i], static_cast<size_t>(outputs[i].size_bytes), i),
          label(EDGESTILL_OUTPUT, i));
  }
  check(method->execute(), "the run failed");
  for (size_t i = 0; i < outputs.size(); ++i) {
    // What lies in the arena is copied; so is an output that the program answers with a tensor of its own
    // (an input passed through, a constant).
    const void* data = method->get_output(i).toTensor().const_data_ptr();
    if (data != output_data[i]) memcpy(output_data[i], data, static_cast<size_t>(outputs[i].size_bytes));
  }
}

extern "C" {

int edgestill_runner_version(void) { return EDGESTILL_RUNNER_VERSION; }

const char* edgestill_error(void) { return last_error.c_str(); }

int edgestill_set_threads(uint32_t threads) {
  return guarded(1, [&] {
    if (threads == 0) fail("threads must be at least 1");
    auto* pool = get_threadpool();
    if (pool == nullptr) fail("the runtime has no thread pool");
    std::lock_guard<std::mutex> lock(process_mutex);
    const size_t now = pool->get_thread_count();
    if (now == threads) return 0;
    if (open_programs > 0)
      fail("this process already runs a program with " + std::to_string(now) + " thread(s), so it cannot use " +
           std::to_string(threads));
    if (!pool->_unsafe_reset_threadpool(threads) || pool->get_thread_count() != threads)
      fail("cannot make a pool of " + std::to_string(threads) + " threads");
    return 0;
  });
}

uint32_t edgestill_threads(void) {
  return guarded(0u, [] {
    auto* pool = get_threadpool();
    return pool == nullptr ? 1u : static_cast<uint32_t>(pool->get_thread_count());
  });
}

edgestill_program* edgestill_open(const char* path, const char* method) {
  return guarded(static_cast<edgestill_program*>(nullptr), [&] { return new edgestill_program(path, method); });
}

void edgestill_close(edgestill_program* program) { delete program; }

size_t edgestill_count(const edgestill_program* program, enum edgestill_side side) {
  return program->tensors[side].size();
}

int edgestill_describe(const edgestill_program* program, enum edgestill_side side, size_t index,
                       struct edgestill_tensor* description) {
  return guarded(1, [&] {
    *description = program->tensors[side].at(index);
    return 0;
  });
}

int64_t edgestill_arena_bytes(const edgestill_program* program) { return program->arena_bytes; }

int edgestill_run(edgestill_program* program, const void* const* inputs, void* const* outputs) {
  return guarded(1, [&] {
    program->run(inputs, outputs);
    return 0;
  });
}

}  // extern "C"

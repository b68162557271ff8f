// The caller's side of TensorRT's plugin interface, for tests. It loads the plugin library as TensorRT would, and uses the library's
// objects only through the interface in the headers. No TensorRT library is linked; Python calls the functions below.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

// ---- objects that TensorRT passes to plugins

struct Logger : ILogger {
    std::string text;
    void log(Severity severity, const AsciiChar* message) noexcept override {
        text += std::to_string(static_cast<int>(severity)) + " " + message + "\n";
    }
};

struct Finder : ILoggerFinder {
    Logger logger;
    ILogger* findLogger() override { return &logger; }
    ~Finder() override = default;
};

struct Recorder : IErrorRecorder {
    std::string text;
    int32_t getNbErrors() const noexcept override { return 0; }
    ErrorCode getErrorCode(int32_t) const noexcept override { return ErrorCode::kSUCCESS; }
    ErrorDesc getErrorDesc(int32_t) const noexcept override { return ""; }
    bool hasOverflowed() const noexcept override { return false; }
    void clear() noexcept override { text.clear(); }
    bool reportError(ErrorCode code, ErrorDesc message) noexcept override {
        text += std::to_string(static_cast<int>(code)) + " " + message + "\n";
        return true;
    }
    RefCount incRefCount() noexcept override { return 1; }
    RefCount decRefCount() noexcept override { return 1; }
};

struct Context : IPluginResourceContext {
    Recorder* recorder;
    explicit Context(Recorder* of) : recorder(of) {}
    IGpuAllocator* getGpuAllocator() const noexcept override { return nullptr; }
    IErrorRecorder* getErrorRecorder() const noexcept override { return recorder; }
    ~Context() noexcept override = default;
};

// A dimension: a number, or a name (or an operation on some, written out).
struct Dimension final : IDimensionExpr, private apiv::VDimensionExpr {
    std::string name;
    explicit Dimension(std::string text) : name(std::move(text)) { mImpl = this; }
    ~Dimension() noexcept override = default;
    bool isConstant() const override { return name.find_first_not_of("0123456789") == std::string::npos; }
    int64_t getConstantValue() const override { return std::stoll(name); }
    bool isSizeTensor() const override { return false; }
};

struct Builder final : IExprBuilder, private apiv::VExprBuilder {
    std::vector<std::unique_ptr<Dimension>> made;
    Builder() { mImpl = this; }
    ~Builder() noexcept override = default;
    const IDimensionExpr* make(std::string name) {
        made.push_back(std::make_unique<Dimension>(std::move(name)));
        return made.back().get();
    }
    const IDimensionExpr* constant(int64_t value) override { return make(std::to_string(value)); }
    const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b) override {
        return make("(" + static_cast<const Dimension&>(a).name + " op" + std::to_string(static_cast<int>(op)) + " " +
                    static_cast<const Dimension&>(b).name + ")");
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override { return nullptr; }
};

// ---- objects that Python holds

struct Tensor {  // as in trt_caller.py
    int32_t rank, type, format, unused;
    int64_t dims[8], minimum[8], maximum[8];
};

Dims dims_of(int32_t rank, const int64_t* values) {
    Dims dims{};
    dims.nbDims = rank;
    for (int32_t i = 0; i < rank; ++i) dims.d[i] = values[i];
    return dims;
}

PluginTensorDesc desc_of(const Tensor& t) {
    PluginTensorDesc desc{};
    desc.dims = dims_of(t.rank, t.dims);
    desc.type = static_cast<DataType>(t.type);
    desc.format = static_cast<TensorFormat>(t.format);
    desc.scale = -1;
    return desc;
}

std::vector<PluginTensorDesc> fixed(const Tensor* tensors, int32_t count) {
    std::vector<PluginTensorDesc> all;
    for (int32_t i = 0; i < count; ++i) all.push_back(desc_of(tensors[i]));
    return all;
}

std::vector<DynamicPluginTensorDesc> dynamic(const Tensor* tensors, int32_t count) {
    std::vector<DynamicPluginTensorDesc> all;
    for (int32_t i = 0; i < count; ++i) {
        DynamicPluginTensorDesc desc{};
        desc.desc = desc_of(tensors[i]);
        desc.min = dims_of(tensors[i].rank, tensors[i].minimum);
        desc.max = desc.opt = dims_of(tensors[i].rank, tensors[i].maximum);
        all.push_back(desc);
    }
    return all;
}

Finder finder;
Recorder recorder;
std::string kept;

template <class Capability>
Capability* capability(void* plugin, PluginCapabilityType type) {
    return static_cast<Capability*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}
IPluginV3OneBuild* build(void* plugin) { return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime* runtime(void* plugin) { return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int trt_major() { return NV_TENSORRT_MAJOR; }

// Loads the library and gives it a logger, in TensorRT's order. Returns a handle, or null with the reason in log().
EXPORT void* trt_load(const char* path, bool with_logger) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        finder.logger.text += dlerror();
        return nullptr;
    }
    auto* set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    if (!set || !dlsym(library, "getCreators")) return nullptr;
    if (with_logger) set(&finder);
    return library;
}

EXPORT int32_t trt_creators(void* library, void** first, int32_t room) {
    int32_t count = -1;
    auto* get = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    IPluginCreatorInterface* const* all = get(count);
    for (int32_t i = 0; i < count && i < room; ++i) first[i] = all[i];
    return count;
}

EXPORT const char* trt_describe(void* library) {
    return reinterpret_cast<const char* (*)()>(dlsym(library, "nemoquant_plugins_describe"))();
}

// kind|name|version|namespace
EXPORT const char* trt_creator_facts(void* creator) {
    auto* interface = static_cast<IPluginCreatorInterface*>(creator);
    auto* one = static_cast<IPluginCreatorV3One*>(interface);
    kept = std::string(interface->getInterfaceInfo().kind) + "|" + one->getPluginName() + "|" + one->getPluginVersion() + "|" +
           one->getPluginNamespace();
    return kept.c_str();
}

EXPORT const PluginFieldCollection* trt_field_names(void* creator) {
    return static_cast<IPluginCreatorV3One*>(static_cast<IPluginCreatorInterface*>(creator))->getFieldNames();
}

EXPORT void* trt_create(void* creator, const PluginFieldCollection* fields, int32_t phase) {
    return static_cast<IPluginCreatorV3One*>(static_cast<IPluginCreatorInterface*>(creator))
        ->createPlugin("a layer", fields, static_cast<TensorRTPhase>(phase));
}

EXPORT void trt_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }
EXPORT void* trt_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }

// name|version|namespace, and the types of the object and its capabilities
EXPORT const char* trt_plugin_facts(void* plugin) {
    auto* core = capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE);
    kept = std::string(core->getPluginName()) + "|" + core->getPluginVersion() + "|" + core->getPluginNamespace() + "|" +
           static_cast<IPluginV3*>(plugin)->getInterfaceInfo().kind + "|" + core->getInterfaceInfo().kind + "|" +
           build(plugin)->getInterfaceInfo().kind + "|" + runtime(plugin)->getInterfaceInfo().kind;
    return kept.c_str();
}

EXPORT int32_t trt_output_count(void* plugin) { return build(plugin)->getNbOutputs(); }

EXPORT int32_t trt_output_types(void* plugin, const int32_t* inputs, int32_t count, int32_t* outputs, int32_t output_count) {
    std::vector<DataType> in(count), out(output_count);
    for (int32_t i = 0; i < count; ++i) in[i] = static_cast<DataType>(inputs[i]);
    const int32_t code = build(plugin)->getOutputDataTypes(out.data(), output_count, in.data(), count);
    for (int32_t i = 0; i < output_count; ++i) outputs[i] = static_cast<int32_t>(out[i]);
    return code;
}

// names: one a dimension, all inputs in order; ranks: one an input. Returns the outputs' dimensions as text, "B L C;B C 3".
EXPORT const char* trt_output_shapes(void* plugin, const char* const* names, const int32_t* ranks, int32_t count, int32_t outputs) {
    Builder builder;
    std::vector<DimsExprs> in(count), out(outputs);
    for (int32_t i = 0; i < count; ++i) {
        in[i].nbDims = ranks[i];
        for (int32_t axis = 0; axis < ranks[i]; ++axis) in[i].d[axis] = builder.make(*names++);
    }
    if (build(plugin)->getOutputShapes(in.data(), count, nullptr, 0, out.data(), outputs, builder) != 0) return nullptr;
    kept.clear();
    for (int32_t i = 0; i < outputs; ++i) {
        kept += i ? ";" : "";
        for (int32_t axis = 0; axis < out[i].nbDims; ++axis)
            kept += (axis ? " " : "") + static_cast<const Dimension*>(out[i].d[axis])->name;
    }
    return kept.c_str();
}

EXPORT bool trt_supports(void* plugin, int32_t pos, const Tensor* tensors, int32_t inputs, int32_t outputs) {
    const auto all = dynamic(tensors, inputs + outputs);
    return build(plugin)->supportsFormatCombination(pos, all.data(), inputs, outputs);
}

EXPORT int32_t trt_configure(void* plugin, const Tensor* in, int32_t inputs, const Tensor* out, int32_t outputs) {
    return build(plugin)->configurePlugin(dynamic(in, inputs).data(), inputs, dynamic(out, outputs).data(), outputs);
}

EXPORT uint64_t trt_workspace(void* plugin, const Tensor* in, int32_t inputs, const Tensor* out, int32_t outputs) {
    return build(plugin)->getWorkspaceSize(dynamic(in, inputs).data(), inputs, dynamic(out, outputs).data(), outputs);
}

EXPORT const char* trt_timing_cache_id(void* plugin) { return build(plugin)->getTimingCacheID(); }

EXPORT const PluginFieldCollection* trt_serialize(void* plugin) { return runtime(plugin)->getFieldsToSerialize(); }

EXPORT void* trt_attach(void* plugin, bool with_recorder) {
    Context context(with_recorder ? &recorder : nullptr);
    return runtime(plugin)->attachToContext(&context);
}

EXPORT int32_t trt_shape_change(void* plugin, const Tensor* in, int32_t inputs, const Tensor* out, int32_t outputs) {
    return runtime(plugin)->onShapeChange(fixed(in, inputs).data(), inputs, fixed(out, outputs).data(), outputs);
}

EXPORT int32_t trt_enqueue(void* plugin, const Tensor* in, int32_t inputs, const Tensor* out, int32_t outputs, const void* const* from,
                       void* const* to, void* space) {
    return runtime(plugin)->enqueue(fixed(in, inputs).data(), fixed(out, outputs).data(), from, to, space, nullptr);
}

// Messages logged (one a line, severity first), or reported to the error recorder, since the last call.
EXPORT const char* trt_take_log(bool of_recorder) {
    std::string& text = of_recorder ? recorder.text : finder.logger.text;
    kept = text;
    text.clear();
    return kept.c_str();
}

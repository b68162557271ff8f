// The shared half of the faces: see plugin.hpp.
#include "plugin.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace nq::trt {

using namespace nvinfer1;

namespace {

constexpr const char* NAMESPACE = "nemoquant";

// Runs ``body``; an exception becomes a logged reason and ``failed``.
template <class Result, class Body>
Result guarded(const char* where, Result failed, Body&& body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        try {
            log_error(std::string(where) + ": " + error.what());
        } catch (...) {  // out of memory: nothing can be said
        }
    } catch (...) {
        log_error("an exception of unknown type");
    }
    return failed;
}

[[noreturn]] void refuse(const std::string& reason) { throw std::invalid_argument(reason); }

template <class Value>
std::string str(const Value& value) {
    std::ostringstream out;
    out << value;
    return out.str();
}

// A float so that no two have the same text.
std::string exact(float value) {
    std::ostringstream out;
    out.precision(std::numeric_limits<float>::max_digits10);
    out << value;
    return out.str();
}

// What the user sees of a string from outside: at most 40 characters, and only printable ones.
std::string quoted(const std::string& text) {
    std::string shown = "'";
    for (char c : text.substr(0, 40)) shown += c >= ' ' && c <= '~' ? c : '?';
    return shown + (text.size() > 40 ? "...'" : "'");
}

const char* kind_name(Kind kind) {
    return kind == Kind::integer ? "an integer" : kind == Kind::real ? "a real number" : "a string";
}

const char* type_name(PluginFieldType type) {
    switch (type) {
        case PluginFieldType::kFLOAT16: return "float16";
        case PluginFieldType::kFLOAT32: return "float32";
        case PluginFieldType::kFLOAT64: return "float64";
        case PluginFieldType::kINT8: return "int8";
        case PluginFieldType::kINT16: return "int16";
        case PluginFieldType::kINT32: return "int32";
        case PluginFieldType::kCHAR: return "string";
        case PluginFieldType::kDIMS: return "dims";
        case PluginFieldType::kBF16: return "bfloat16";
        case PluginFieldType::kINT64: return "int64";
        default: return "some other type";
    }
}

const char* type_name(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return "float32";
        case DataType::kHALF: return "float16";
        case DataType::kBF16: return "bfloat16";
        case DataType::kINT8: return "int8";
        case DataType::kINT32: return "int32";
        case DataType::kINT64: return "int64";
        case DataType::kFP8: return "float8e4m3";
        case DataType::kFP4: return "float4e2m1";
        case DataType::kBOOL: return "bool";
        case DataType::kUINT8: return "uint8";
        default: return "some other type";
    }
}

// The enum of abi.h; -1 where only the operator knows (bytes of packed codes), or where there is none.
int32_t abi_type(DataType type) {
    switch (type) {
        case DataType::kFLOAT: return NEMOQUANT_FLOAT32;
        case DataType::kHALF: return NEMOQUANT_FLOAT16;
        case DataType::kBF16: return NEMOQUANT_BFLOAT16;
        case DataType::kFP8: return NEMOQUANT_E4M3;
        case DataType::kFP4: return NEMOQUANT_E2M1X2;
        case DataType::kINT64: return NEMOQUANT_INT64;
        case DataType::kINT32: return NEMOQUANT_INT32;
        default: return -1;
    }
}

std::string expected(const Field& field) {
    if (field.kind != Kind::text)
        return std::string(kind_name(field.kind)) + " from " + str(field.minimum) + " to " + str(field.maximum);
    std::string all;
    for (const char* value : field.values) all += (all.empty() ? "" : ", ") + std::string(value);
    return "a string, one of: " + all;
}

}  // namespace

Field integer(const char* name, int32_t fallback, int32_t minimum, int32_t maximum) {
    return {name, Kind::integer, double(fallback), "", double(minimum), double(maximum), {}};
}

Field real(const char* name, double fallback, double minimum, double maximum) {
    return {name, Kind::real, fallback, "", minimum, maximum, {}};
}

Field text(const char* name, const char* fallback, std::vector<const char*> values) {
    return {name, Kind::text, 0, fallback, 0, 0, std::move(values)};
}

// ---------------------------------------------------------------------------------------------------------- attributes

namespace {

// The one number of a field, if it has a type that ``kind`` admits.
std::optional<double> number(const PluginField& given, Kind kind) {
    const auto read = [&](auto zero) {
        std::memcpy(&zero, given.data, sizeof zero);
        return static_cast<double>(zero);
    };
    if (kind == Kind::integer && given.type == PluginFieldType::kINT32) return read(int32_t{});
    if (kind == Kind::integer && given.type == PluginFieldType::kINT64) return read(int64_t{});
    if (kind == Kind::real && given.type == PluginFieldType::kFLOAT32) return read(float{});
    if (kind == Kind::real && given.type == PluginFieldType::kFLOAT64) return read(double{});
    return std::nullopt;
}

}  // namespace

Attributes::Attributes(const std::vector<Field>& table) {
    for (const Field& field : table)
        values_.push_back({field, field.kind == Kind::integer ? static_cast<int32_t>(field.number) : 0,
                           static_cast<float>(field.number), field.word});
    collect();
}

Attributes::Attributes(const std::vector<Field>& table, const PluginFieldCollection* given) : Attributes(table) {
    if (!given || given->nbFields < 0 || (given->nbFields > 0 && !given->fields)) refuse("there is no collection of fields");
    std::vector<bool> seen(values_.size());
    for (int32_t i = 0; i < given->nbFields; ++i) {
        const PluginField& field = given->fields[i];
        const std::string name = field.name ? field.name : "";
        size_t at = 0;
        while (at < values_.size() && name != values_[at].field.name) ++at;
        if (at == values_.size()) {
            std::string all;
            for (const Value& value : values_) all += (all.empty() ? "" : ", ") + std::string(value.field.name);
            refuse("field " + quoted(name) + " is unknown; the fields are: " + all);
        }
        const std::string label = "field '" + name + "'";
        Value& value = values_[at];
        const std::string wanted = "; expected " + expected(value.field);
        if (seen[at]) refuse(label + " is given twice; expected it once");
        seen[at] = true;
        if (!field.data || field.length < 1) refuse(label + " has no data" + wanted);
        if (value.field.kind == Kind::text) {
            if (field.type != PluginFieldType::kCHAR) refuse(label + " is of type " + type_name(field.type) + wanted);
            std::string text(static_cast<const char*>(field.data), static_cast<size_t>(field.length));
            if (text.back() == '\0') text.pop_back();  // parsers differ in whether they count the end
            const auto& values = value.field.values;
            if (std::find(values.begin(), values.end(), text) == values.end()) refuse(label + " is " + quoted(text) + wanted);
            value.text = text;
            continue;
        }
        if (field.length != 1) refuse(label + " has " + str(field.length) + " values" + wanted);
        const std::optional<double> read = number(field, value.field.kind);
        if (!read) refuse(label + " is of type " + type_name(field.type) + wanted);
        if (!(*read >= value.field.minimum && *read <= value.field.maximum)) refuse(label + " is " + str(*read) + wanted);
        if (value.field.kind == Kind::integer)
            value.integer = static_cast<int32_t>(*read);
        else
            value.real = static_cast<float>(*read);
    }
    for (size_t at = 0; at < values_.size(); ++at)
        if (!seen[at])
            refuse("field '" + std::string(values_[at].field.name) + "' is missing; expected " + expected(values_[at].field) +
                   ", every field is written by nemoquant's export");
    collect();
}

void Attributes::collect() {
    fields_.clear();
    for (Value& value : values_) {
        const char* name = value.field.name;
        if (value.field.kind == Kind::integer)
            fields_.emplace_back(name, &value.integer, PluginFieldType::kINT32, 1);
        else if (value.field.kind == Kind::real)
            fields_.emplace_back(name, &value.real, PluginFieldType::kFLOAT32, 1);
        else
            fields_.emplace_back(name, value.text.c_str(), PluginFieldType::kCHAR, static_cast<int32_t>(value.text.size() + 1));
    }
    collection_.nbFields = static_cast<int32_t>(fields_.size());
    collection_.fields = fields_.data();
    id_.clear();
    for (const Value& value : values_) {
        const std::string shown = value.field.kind == Kind::integer ? str(value.integer)
                                  : value.field.kind == Kind::real  ? exact(value.real)
                                                                    : value.text;
        id_ += (id_.empty() ? "" : " ") + std::string(value.field.name) + "=" + shown;
    }
}

const Attributes::Value& Attributes::value(const char* name, Kind kind) const {
    for (const Value& value : values_)
        if (value.field.kind == kind && std::strcmp(value.field.name, name) == 0) return value;
    throw std::logic_error(std::string("the table has no ") + kind_name(kind) + " called " + name);
}

int32_t Attributes::integer(const char* name) const { return value(name, Kind::integer).integer; }
float Attributes::real(const char* name) const { return value(name, Kind::real).real; }
const std::string& Attributes::text(const char* name) const { return value(name, Kind::text).text; }

void Attributes::set_text(const char* name, const char* to) {
    for (Value& value : values_)
        if (value.field.kind == Kind::text && std::strcmp(value.field.name, name) == 0) value.text = to;
    collect();
}

// -------------------------------------------------------------------------------------------------------------- shapes

namespace {

std::vector<std::string> words(const char* shape) {
    std::istringstream in(shape);
    std::vector<std::string> all;
    for (std::string word; in >> word;) all.push_back(word);
    return all;
}

bool is_number(const std::string& word) { return word.find_first_not_of("0123456789") == std::string::npos; }

// "K-1" with K = 4 is 3; -1 where the size is unknown.
int64_t dimension(const std::string& word, const Sizes& sizes) {
    if (is_number(word)) return std::stoll(word);
    const int64_t size = sizes[word[0]];
    if (size < 0 || word.size() == 1) return size;
    const int64_t by = std::stoll(word.substr(2));
    if (word[1] == '-') return size - by;
    if (word[1] == '*') return size * by;
    if (word[1] == '/') return size % by ? -1 : size / by;
    throw std::logic_error("no such dimension: " + word);
}

std::string show(const Dims& dims) {
    std::string all = "[";
    for (int32_t i = 0; i < dims.nbDims; ++i) all += (i ? ", " : "") + str(dims.d[i]);
    return all + "]";
}

// One port with its dimensions taken apart.
struct Parsed : Port {
    explicit Parsed(const Port& port) : Port(port), dims(words(port.shape)) {}
    std::vector<std::string> dims;
};

// ------------------------------------------------------------------------------------------------------------- plugin

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
  public:
    Plugin(const Definition& definition, std::shared_ptr<const Attributes> attributes)
        : definition_(definition), attributes_(std::move(attributes)) {
        for (const Port& port : definition.inputs(*attributes_)) inputs_.emplace_back(port);
        for (const Port& port : definition.outputs) outputs_.emplace_back(port);
    }

    // IPluginV3
    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override { return copy(recorder_); }

    // Core
    const AsciiChar* getPluginName() const noexcept override { return definition_.name; }
    const AsciiChar* getPluginVersion() const noexcept override { return definition_.version; }
    const AsciiChar* getPluginNamespace() const noexcept override { return NAMESPACE; }

    // Build
    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(outputs_.size()); }

    int32_t getOutputDataTypes(DataType* types, int32_t nbOutputs, const DataType* inputs, int32_t nbInputs) const noexcept override {
        return guarded(definition_.name, -1, [&] {
            check_counts(nbInputs, nbOutputs);
            for (int32_t i = 0; i < nbOutputs; ++i)
                types[i] = outputs_[i].same ? inputs[input(outputs_[i].same)] : outputs_[i].types.at(0);
            return 0;
        });
    }

    // A dimension of an output is that of the first input where its word stands; a constant one comes first.
    int32_t getOutputShapes(const DimsExprs* inputs, int32_t nbInputs, const DimsExprs*, int32_t, DimsExprs* outputs,
                            int32_t nbOutputs, IExprBuilder&) noexcept override {
        return guarded(definition_.name, -1, [&] {
            check_counts(nbInputs, nbOutputs);
            for (int32_t i = 0; i < nbInputs; ++i) check_rank("input", inputs_[i], inputs[i].nbDims);
            for (int32_t i = 0; i < nbOutputs; ++i) {
                outputs[i].nbDims = static_cast<int32_t>(outputs_[i].dims.size());
                for (size_t axis = 0; axis < outputs_[i].dims.size(); ++axis)
                    outputs[i].d[axis] = find(outputs_[i].dims[axis], inputs, nbInputs);
            }
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t pos, const DynamicPluginTensorDesc* inOut, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept override {
        return guarded(definition_.name, false, [&] {
            check_counts(nbInputs, nbOutputs);
            if (pos < 0 || pos >= nbInputs + nbOutputs) refuse("there is no tensor " + str(pos));
            const PluginTensorDesc& desc = inOut[pos].desc;
            const Parsed& port = pos < nbInputs ? inputs_[pos] : outputs_[pos - nbInputs];
            if (desc.format != TensorFormat::kLINEAR) return false;
            return admits(port, desc.type, [&](int32_t i) { return inOut[i].desc.type; });
        });
    }

    int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t nbInputs, const DynamicPluginTensorDesc*,
                            int32_t nbOutputs) noexcept override {
        return guarded(definition_.name, -1, [&] {
            check_counts(nbInputs, nbOutputs);
            check_types(nbInputs, [&](int32_t i) -> const PluginTensorDesc& { return in[i].desc; });
            // What is constant may not contradict itself. The bounds of the rest may: TensorRT infers them for each input apart, also
            // where the same size stands. Shapes at run time are checked whole, in onShapeChange.
            bind(nbInputs, [&](int32_t i) -> const Dims& { return in[i].desc.dims; });
            return 0;
        });
    }

    size_t getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t nbInputs, const DynamicPluginTensorDesc* out,
                            int32_t nbOutputs) const noexcept override {
        return guarded(definition_.name, size_t{0}, [&] {
            check_counts(nbInputs, nbOutputs);
            const Call call = prepare(bounds(in, nbInputs), nbInputs, nbOutputs,
                                      [&](int32_t i) { return in[i].desc.type; }, [&](int32_t i) { return out[i].desc.type; });
            return definition_.workspace(call);
        });
    }

    // Beside name, version, shapes and types: what decides which kernel runs. Without one, TensorRT keeps no times of plugins.
    const char* getTimingCacheID() noexcept override { return attributes_->id().c_str(); }

    // Runtime
    int32_t onShapeChange(const PluginTensorDesc* in, int32_t nbInputs, const PluginTensorDesc* out,
                          int32_t nbOutputs) noexcept override {
        call_.reset();
        return reported([&] {
            check_counts(nbInputs, nbOutputs);
            check_types(nbInputs, [&](int32_t i) -> const PluginTensorDesc& { return in[i]; });
            const Sizes sizes = bind(nbInputs, [&](int32_t i) -> const Dims& { return in[i].dims; });
            for (int32_t i = 0; i < nbInputs; ++i) check_known(inputs_[i], in[i].dims);
            call_.emplace(prepare(sizes, nbInputs, nbOutputs, [&](int32_t i) { return in[i].type; },
                                  [&](int32_t i) { return out[i].type; }));
            return 0;
        });
    }

    int32_t enqueue(const PluginTensorDesc*, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                    void* workspace, cudaStream_t stream) noexcept override {
        return reported([&] {
            if (!call_) refuse("enqueue before a successful onShapeChange");
            call_->inputs.assign(inputs, inputs + call_->input_types.size());
            call_->outputs.assign(outputs, outputs + call_->output_types.size());
            call_->inputs.resize(inputs_.size());  // those left out are null; the room is there since the first call
            call_->workspace = workspace;
            call_->stream = stream;
            if (definition_.launch(*call_) != NEMOQUANT_OK) refuse(nemoquant_last_error());
            return 0;
        });
    }

    IPluginV3* attachToContext(IPluginResourceContext* context) noexcept override {
        return copy(context ? context->getErrorRecorder() : nullptr);
    }

    const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &attributes_->collection(); }

  private:
    IPluginV3* copy(IErrorRecorder* recorder) const noexcept {
        return guarded(definition_.name, static_cast<Plugin*>(nullptr), [&] {
            auto made = std::make_unique<Plugin>(definition_, attributes_);
            made->recorder_ = recorder;
            return made.release();
        });
    }

    // As ``guarded``, and the application's error recorder hears of it.
    template <class Body>
    int32_t reported(Body&& body) noexcept {
        return guarded(definition_.name, -1, [&] {
            try {
                return body();
            } catch (const std::exception& error) {
                if (recorder_) recorder_->reportError(ErrorCode::kFAILED_EXECUTION, error.what());
                throw;
            }
        });
    }

    int32_t input(const char* name) const {
        for (size_t i = 0; i < inputs_.size(); ++i)
            if (std::strcmp(inputs_[i].name, name) == 0) return static_cast<int32_t>(i);
        throw std::logic_error(std::string("the table has no input ") + name);
    }

    void check_counts(int32_t nbInputs, int32_t nbOutputs) const {
        const auto all = static_cast<int32_t>(inputs_.size());
        const auto required = static_cast<int32_t>(std::count_if(inputs_.begin(), inputs_.end(), [](const Parsed& p) { return !p.optional; }));
        if (nbInputs < required || nbInputs > all)
            refuse("got " + str(nbInputs) + " inputs; expected " + (required < all ? str(required) + " to " : "") + str(all));
        if (nbOutputs != static_cast<int32_t>(outputs_.size()))
            refuse("got " + str(nbOutputs) + " outputs; expected " + str(outputs_.size()));
    }

    void check_rank(const char* which, const Parsed& port, int32_t rank) const {
        if (rank != static_cast<int32_t>(port.dims.size()))
            refuse(std::string(which) + " " + port.name + " has rank " + str(rank) + "; expected [" + port.shape + "]");
    }

    template <class TypeOf>  // (index of an input) -> DataType
    bool admits(const Parsed& port, DataType type, TypeOf type_of) const {
        if (port.same) return type == type_of(input(port.same));
        return std::find(port.types.begin(), port.types.end(), type) != port.types.end();
    }

    template <class DescOf>
    void check_types(int32_t nbInputs, DescOf desc_of) const {
        for (int32_t i = 0; i < nbInputs; ++i) {
            const PluginTensorDesc& desc = desc_of(i);
            if (!admits(inputs_[i], desc.type, [&](int32_t j) { return desc_of(j).type; }))
                refuse(std::string("input ") + inputs_[i].name + " is " + type_name(desc.type) + "; expected " +
                       (inputs_[i].same ? std::string("the type of ") + inputs_[i].same : list_types(inputs_[i])));
        }
    }

    static std::string list_types(const Port& port) {
        std::string all;
        for (DataType type : port.types) all += (all.empty() ? "" : " or ") + std::string(type_name(type));
        return all;
    }

    // The sizes that the inputs have; refuses ranks and dimensions that contradict the tables. Unknown ones (-1) pass.
    template <class DimsOf>
    Sizes bind(int32_t nbInputs, DimsOf dims_of) const {
        Sizes sizes;
        for (int32_t i = 0; i < nbInputs; ++i) {
            const Dims& dims = dims_of(i);
            check_rank("input", inputs_[i], dims.nbDims);
            for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
                const std::string& word = inputs_[i].dims[axis];
                if (word.size() == 1 && !is_number(word) && sizes[word[0]] < 0) sizes[word[0]] = dims.d[axis];
            }
        }
        for (int32_t i = 0; i < nbInputs; ++i) {
            const Dims& dims = dims_of(i);
            for (int32_t axis = 0; axis < dims.nbDims; ++axis) {
                const std::string& word = inputs_[i].dims[axis];
                const int64_t want = dimension(word, sizes);
                if (dims.d[axis] >= 0 && (is_number(word) || sizes[word[0]] >= 0) && dims.d[axis] != want)
                    refuse(std::string("input ") + inputs_[i].name + " is " + show(dims) + "; expected [" + inputs_[i].shape + "]" +
                           (want >= 0 ? " with " + word + " = " + str(want)
                                      : ", but " + word + " is no whole number for " + word[0] + " = " + str(sizes[word[0]])));
            }
        }
        return sizes;
    }

    // The smallest bound that any input has for each size: at run time it is one size, so that all bounds hold for it.
    Sizes bounds(const DynamicPluginTensorDesc* in, int32_t nbInputs) const {
        Sizes sizes;
        for (int32_t i = 0; i < nbInputs; ++i) {
            check_rank("input", inputs_[i], in[i].max.nbDims);
            for (int32_t axis = 0; axis < in[i].max.nbDims; ++axis) {
                const std::string& word = inputs_[i].dims[axis];
                const int64_t bound = in[i].max.d[axis];
                if (word.size() != 1 || is_number(word) || bound < 0) continue;
                int64_t& size = sizes[word[0]];
                size = size < 0 ? bound : std::min(size, bound);
            }
        }
        return sizes;
    }

    static void check_known(const Parsed& port, const Dims& dims) {
        for (int32_t axis = 0; axis < dims.nbDims; ++axis)
            if (dims.d[axis] < 0) refuse(std::string("input ") + port.name + " is " + show(dims) + "; expected a known size");
    }

    const IDimensionExpr* find(const std::string& word, const DimsExprs* inputs, int32_t nbInputs) const {
        const IDimensionExpr* found = nullptr;
        for (int32_t i = 0; i < nbInputs; ++i)
            for (size_t axis = 0; axis < inputs_[i].dims.size(); ++axis)
                if (inputs_[i].dims[axis] == word && (!found || (!found->isConstant() && inputs[i].d[axis]->isConstant())))
                    found = inputs[i].d[axis];
        if (!found) throw std::logic_error("no input has the dimension " + word);
        return found;
    }

    template <class InputType, class OutputType>
    Call prepare(const Sizes& sizes, int32_t nbInputs, int32_t nbOutputs, InputType input_type, OutputType output_type) const {
        Call call{*attributes_, sizes, {}, {}, {}, {}};
        for (int32_t i = 0; i < nbInputs; ++i) call.input_types.push_back(abi_type(input_type(i)));
        for (int32_t i = 0; i < nbOutputs; ++i) call.output_types.push_back(abi_type(output_type(i)));
        call.inputs.resize(inputs_.size());
        call.outputs.resize(outputs_.size());
        return call;
    }

    const Definition& definition_;
    std::shared_ptr<const Attributes> attributes_;
    std::vector<Parsed> inputs_, outputs_;
    IErrorRecorder* recorder_ = nullptr;
    std::optional<Call> call_;  // of the last onShapeChange
};

class Creator final : public IPluginCreatorV3One {
  public:
    explicit Creator(const Definition& definition) : definition_(definition), names_(definition.fields) {}

    IPluginV3* createPlugin(const AsciiChar*, const PluginFieldCollection* fields, TensorRTPhase) noexcept override {
        return guarded(definition_.name, static_cast<Plugin*>(nullptr), [&] {
            return std::make_unique<Plugin>(definition_, std::make_shared<const Attributes>(definition_.fields, fields)).release();
        });
    }
    const PluginFieldCollection* getFieldNames() noexcept override { return &names_.collection(); }
    const AsciiChar* getPluginName() const noexcept override { return definition_.name; }
    const AsciiChar* getPluginVersion() const noexcept override { return definition_.version; }
    const AsciiChar* getPluginNamespace() const noexcept override { return NAMESPACE; }

  private:
    const Definition& definition_;
    const Attributes names_;  // at their defaults
};

}  // namespace

std::vector<std::unique_ptr<IPluginCreatorInterface>>& creators() {
    static std::vector<std::unique_ptr<IPluginCreatorInterface>> all;
    return all;
}

std::vector<const Definition*>& definitions() {
    static std::vector<const Definition*> all;
    return all;
}

Registration::Registration(const Definition& definition) {
    definitions().push_back(&definition);
    creators().push_back(std::make_unique<Creator>(definition));
}

}  // namespace nq::trt

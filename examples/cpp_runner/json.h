// A reader of JSON, for schedules and the headers of safetensors files.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::map<std::string, Json>;

  // Throws std::runtime_error with the byte at which the text is no JSON.
  static Json parse(const std::string& text) {
    Reader reader{text};
    Json value = reader.value(0);
    reader.skip_space();
    if (reader.at != text.size()) reader.fail("the end");
    return value;
  }

  double number() const { return get<double>("a number"); }
  int64_t integer() const { return static_cast<int64_t>(number()); }
  bool boolean() const { return get<bool>("a boolean"); }
  const std::string& string() const { return get<std::string>("a string"); }
  const Array& array() const { return get<Array>("a list"); }
  const Object& object() const { return get<Object>("an object"); }

  bool has(const std::string& key) const { return object().count(key) != 0; }

  const Json& operator[](const std::string& key) const {
    auto found = object().find(key);
    if (found == object().end()) throw std::runtime_error("the entry \"" + key + "\" is missing");
    return found->second;
  }

  const Json& operator[](size_t index) const { return array().at(index); }

  std::vector<int64_t> integers() const {
    std::vector<int64_t> values;
    for (const Json& entry : array()) values.push_back(entry.integer());
    return values;
  }

 private:
  std::variant<std::nullptr_t, bool, double, std::string, Array, Object> held = nullptr;

  template <class T>
  const T& get(const char* wanted) const {
    if (const T* value = std::get_if<T>(&held)) return *value;
    throw std::runtime_error(std::string("the schedule or header has something else where ") + wanted + " is expected");
  }

  struct Reader {
    const std::string& text;
    size_t at = 0;

    [[noreturn]] void fail(const std::string& wanted) const {
      throw std::runtime_error("no JSON: expected " + wanted + " at byte " + std::to_string(at));
    }

    void skip_space() {
      while (at < text.size() && std::string(" \t\r\n").find(text[at]) != std::string::npos) ++at;
    }

    bool take(char wanted) {
      skip_space();
      if (at >= text.size() || text[at] != wanted) return false;
      ++at;
      return true;
    }

    void need(char wanted) {
      if (!take(wanted)) fail(std::string(1, wanted));
    }

    bool word(const std::string& wanted) {
      if (text.compare(at, wanted.size(), wanted) != 0) return false;
      at += wanted.size();
      return true;
    }

    Json value(int depth) {
      if (depth > 64) fail("at most 64 levels");
      skip_space();
      Json made;
      if (at >= text.size()) fail("a value");
      if (text[at] == '{') made.held = object(depth);
      else if (text[at] == '[') made.held = array(depth);
      else if (text[at] == '"') made.held = quoted();
      else if (word("true")) made.held = true;
      else if (word("false")) made.held = false;
      else if (!word("null")) made.held = plain_number();
      return made;
    }

    Object object(int depth) {
      Object entries;
      need('{');
      if (take('}')) return entries;
      do {
        skip_space();
        std::string key = quoted();
        need(':');
        entries[key] = value(depth + 1);
      } while (take(','));
      need('}');
      return entries;
    }

    Array array(int depth) {
      Array entries;
      need('[');
      if (take(']')) return entries;
      do entries.push_back(value(depth + 1));
      while (take(','));
      need(']');
      return entries;
    }

    double plain_number() {
      const char* start = text.c_str() + at;
      char* end = nullptr;
      double number = std::strtod(start, &end);
      if (end == start) fail("a value");
      at += static_cast<size_t>(end - start);
      return number;
    }

    std::string quoted() {
      need('"');
      std::string made;
      while (at < text.size() && text[at] != '"') {
        if (text[at] != '\\') made += text[at++];
        else escaped(made);
      }
      need('"');
      return made;
    }

    // Code points above 127 are kept as they stand, escaped: names of tensors and inputs have none.
    void escaped(std::string& made) {
      if (at + 1 >= text.size()) fail("an escaped character");
      const std::string letters = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
      size_t which = letters.find(text[at + 1]);
      if (which != std::string::npos) {
        made += meant[which];
      } else {
        made += text.substr(at, 2);
      }
      at += 2;
    }
  };
};
